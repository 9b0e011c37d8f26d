"""The modules as any PyTorch user treats them: adapters, hooks, layers of one's own, wrappers.

Whatever stands in the place of a layer is what runs, in training, in evaluation and in the deploy form.
"""

import copy
import functools
import re
import warnings
from collections import Counter, defaultdict
from functools import partial

import pytest
import torch
from helpers.behaviours import (
    BLOCK,
    BOXES,
    MODES,
    POINTWISE,
    SecondStage,
    assert_changed,
    assert_close,
    assert_matches_float64,
    backbone,
    called_modules,
    float64_copy,
    float64_outputs,
    images,
    loss_of,
    module_of_block,
    outputs_of,
    replace_in_block,
    unchanged_outputs,
)
from mmcv.cnn import fuse_conv_bn
from mmcv.cnn.bricks import DropPath
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

pytest_plugins = ['helpers.behaviours']


class HidingLoRA(nn.Module):
    """A layer plus a product of two thin ones; it has no weight of its own."""

    def __init__(self, layer: nn.Module, rank: int = 2):
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            self.down = nn.Conv2d(layer.in_channels, rank, 1, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        for part in (self.down, self.up):
            nn.init.normal_(part.weight, std=0.5)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))

    @torch.no_grad()
    def merge(self):
        """The one layer that does the same."""
        product = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        self.layer.weight += product.view_as(self.layer.weight)
        return self.layer


class ExposingLoRA(HidingLoRA):
    """The same, which shows the layer's weight as its own, as PEFT's adapters do."""

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias


def merged(model):
    """A float64 copy whose adapters are merged."""
    model = float64_copy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, HidingLoRA):
            parent, _, last = name.rpartition('.')
            setattr(model.get_submodule(parent), last, module.merge())
    return model


def deployed_or_refused(model, names):
    """Switch a model to its deploy form; False if it is refused, with the name of one of the layers."""
    try:
        model.eval().switch_to_deploy()
    except ValueError as error:
        assert any(re.search(rf'\b{re.escape(name)}\b', str(error)) for name in names), error
        return False
    return True


def in_all_modes(cases, name_of=lambda case: case, attribute=None):
    """Cases of layers in every mode, but for layers or tensors that the deploy form has folded."""
    deployed = SecondStage('deploy')

    def is_left(case):
        layer = module_of_block(deployed, name_of(case))
        return not isinstance(layer, nn.Identity) and (not attribute or getattr(layer, attribute(case)) is not None)

    return [
        pytest.param(case, mode, id=f'{case}-{mode}')
        for mode in MODES
        for case in cases
        if mode != 'deploy' or is_left(case)
    ]


class TestAdapters:
    @pytest.mark.parametrize('adapter', [ExposingLoRA, HidingLoRA])
    @pytest.mark.parametrize('name, mode', in_all_modes(POINTWISE))
    def test_lora_in_place_of_a_layer(self, name, adapter, mode):
        model = SecondStage(mode)
        replace_in_block(model, name, adapter(module_of_block(model, name)))
        x = SecondStage.input()
        expected = outputs_of(merged(model), x.double(), gradients=False)
        assert_close(outputs_of(model, x, gradients=False), expected)
        assert_changed(expected, unchanged_outputs(mode, 'stage'))

    @pytest.mark.parametrize('adapter', [ExposingLoRA, HidingLoRA])
    @pytest.mark.parametrize('name', POINTWISE)
    def test_lora_learns(self, name, adapter):
        model = SecondStage('train')
        lora = adapter(module_of_block(model, name))
        replace_in_block(model, name, lora)
        x = SecondStage.input()
        outputs_of(model, x)
        reference = merged(model)
        outputs_of(reference, x.double())
        weight_grad = module_of_block(reference, name).weight.grad.flatten(1)
        down, up = (layer.weight for layer in (lora.down, lora.up))
        got = {'grad of down': down.grad.flatten(1), 'grad of up': up.grad.flatten(1)}
        expected = {
            'grad of down': up.double().flatten(1).t() @ weight_grad,
            'grad of up': weight_grad @ down.double().flatten(1).t(),
        }
        assert_close(got, expected)

    @pytest.mark.parametrize('adapter', [ExposingLoRA, HidingLoRA])
    @pytest.mark.parametrize('name', POINTWISE)
    def test_lora_before_deploy_is_kept_or_refused(self, name, adapter):
        model = backbone('eval')
        replace_in_block(model, name, adapter(module_of_block(model, name)))
        expected = outputs_of(merged(model), images().double())
        if deployed_or_refused(model, [f'{BLOCK}.{name}']):
            assert_close(outputs_of(model, images()), expected)

    @pytest.mark.parametrize('adapter', [ExposingLoRA, HidingLoRA])
    @pytest.mark.parametrize('mode', MODES)
    def test_lora_everywhere(self, mode, adapter):
        model = backbone(mode)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
                parent, _, last = name.rpartition('.')
                setattr(model.get_submodule(parent), last, adapter(module))
        expected = outputs_of(merged(model), images().double(), gradients=False)
        assert_close(outputs_of(model, images(), gradients=False), expected)

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', ['channel_mixing.fc2', 'strip_mixing.fuse'])
    def test_an_adapter_is_taken_off_again(self, name, mode):
        model = SecondStage(mode)
        layer = module_of_block(model, name)
        replace_in_block(model, name, HidingLoRA(layer))
        outputs_of(model, SecondStage.input(), gradients=False)
        replace_in_block(model, name, layer)
        assert_matches_float64(model.eval(), SecondStage.input())

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', ['', 'channel_mixing', 'strip_mixing', 'strip_mixing.branches.lsmm'])
    def test_an_adapter_after_a_box(self, name, mode):
        model = SecondStage(mode)
        channels = 16 if name.endswith('lsmm') else 32
        replace_in_block(
            model, name, nn.Sequential(module_of_block(model, name), nn.Conv2d(channels, channels, 1), nn.Tanh())
        )
        assert_changed(assert_matches_float64(model, SecondStage.input()), unchanged_outputs(mode, 'stage'))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_stage_is_added_to(self, mode):
        model = backbone(mode)
        model.stages[1].append(nn.Conv2d(32, 32, 1))
        assert_changed(assert_matches_float64(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_stage_is_cut(self, mode):
        model = backbone(mode)
        model.stages[2] = model.stages[2][1:]
        expected = assert_matches_float64(model, images())
        assert_changed(expected, unchanged_outputs(mode))
        model = backbone(mode)
        model.stages[2] = nn.Sequential(*model.stages[2][1:])
        got = outputs_of(model, images(), gradients=False)
        assert_close(got, {name: expected[name] for name in got})


NAMES = {
    mode: [
        name
        for name, module in called_modules(backbone(mode))
        if name.startswith(BLOCK)
        or name in ('', 'patch_embed', 'merging.0', 'cross_stage.2.0', 'stages.1', 'stages.2', 'stages.2.1')
    ]
    for mode in MODES
}


def in_modes(*modes):
    return [pytest.param(mode, name, id=f'{mode}-{name or "model"}') for mode in modes for name in NAMES[mode]]


EVERY_NAME = in_modes(*MODES)


def part_with(mode, name):
    """The smallest part of a backbone that holds a module, as that is quick to run, and what it takes."""
    if name.startswith('stages.1'):
        return SecondStage(mode), SecondStage.input()
    return backbone(mode), images()


def unchanged_outputs_of(mode, name):
    return unchanged_outputs(mode, 'stage' if name.startswith('stages.1') else 'model')


def flipped(output):
    """What the tests make of an output: channels (or rows) backwards."""
    return tuple(part.flip(1) for part in output) if isinstance(output, tuple) else output.flip(1)


def flip_by_hook(module):
    module.register_forward_hook(lambda module, inputs, output: flipped(output))


def flip_by_pre_hook(module):
    module.register_forward_pre_hook(lambda module, inputs: tuple(part.flip(1) for part in inputs))


def flip_by_subclass(module):
    base = type(module)
    forward = lambda self, *inputs, **named: flipped(base.forward(self, *inputs, **named))  # noqa: E731
    module.__class__ = type(f'Flipped{base.__name__}', (base,), dict(forward=forward))


def flip_by_patched_forward(module):
    forward = module.forward
    module.forward = lambda *inputs, **named: flipped(forward(*inputs, **named))


@functools.cache
def flipped_by_hook(mode, name, flip=flip_by_hook):
    """Maps of a float64 model, one of whose modules has a hook."""
    model, x = part_with(mode, name)
    flip(model.get_submodule(name))
    return float64_outputs(model, x, gradients=False)


class Seen:
    """What hooks see: inputs and outputs by name, and copies of the outputs."""

    def __init__(self, model):
        self.calls = defaultdict(list)
        for name, module in called_modules(model):
            module.register_forward_pre_hook(partial(self._before, name))
            module.register_forward_hook(partial(self._after, name))
        self.inputs = defaultdict(list)

    def _before(self, name, module, inputs):
        self.inputs[name].append(inputs)

    def _after(self, name, module, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        self.calls[name].append((inputs, outputs, [part.detach().clone() for part in outputs]))

    def counts(self):
        return {name: len(calls) for name, calls in self.calls.items()}

    def tensors(self):
        """Inputs and outputs of all calls in one dict."""
        return {
            f'map {name} {i} {kind} {j}': tensor.detach()
            for name, calls in self.calls.items()
            for i, call in enumerate(calls)
            for kind, tensors in zip(('input', 'output'), call)
            for j, tensor in enumerate(tensors)
        }


def expected_calls(model):
    """Each module runs once; drop path serves both branches of a block."""
    return {name: 2 if isinstance(module, DropPath) else 1 for name, module in called_modules(model)}


class TestHooks:
    @pytest.mark.parametrize('mode', MODES)
    def test_they_fire_on_every_module_and_see_what_is_right(self, mode):
        model, reference = backbone(mode), float64_copy(backbone(mode))
        seen, expected = Seen(model), Seen(reference)
        assert_close(outputs_of(model, images()), outputs_of(reference, images().double()))
        assert seen.counts() == expected_calls(model)
        assert {name: len(calls) for name, calls in seen.inputs.items()} == expected_calls(model)
        assert_close(seen.tensors(), expected.tensors())

    @pytest.mark.parametrize('mode', MODES)
    def test_what_they_store_is_not_overwritten(self, mode):
        model = backbone(mode)
        seen = Seen(model)
        outputs_of(model, images())
        assert seen.counts().keys() == expected_calls(model).keys()
        for name, calls in seen.calls.items():
            for _, outputs, copies in calls:
                assert all(map(torch.equal, outputs, copies)), name

    @pytest.mark.parametrize('mode, name', EVERY_NAME)
    def test_one_fires_once_and_replaces_the_output(self, mode, name):
        model, x = part_with(mode, name)
        module, calls = model.get_submodule(name), []
        module.register_forward_hook(lambda *hooked: calls.append(module))
        flip_by_hook(module)
        got = outputs_of(model, x, gradients=False)
        assert len(calls) == (2 if isinstance(module, DropPath) else 1)
        assert_close(got, flipped_by_hook(mode, name))
        assert_changed(got, unchanged_outputs_of(mode, name))

    @pytest.mark.parametrize('mode, name', in_modes('train', 'deploy'))
    def test_one_replaces_inputs(self, mode, name):
        model, x = part_with(mode, name)
        flip_by_pre_hook(model.get_submodule(name))
        got = outputs_of(model, x, gradients=False)
        assert_close(got, flipped_by_hook(mode, name, flip_by_pre_hook))
        assert_changed(got, unchanged_outputs_of(mode, name))

    @pytest.mark.parametrize('mode', MODES)
    def test_they_are_taken_off_again(self, mode):
        model = backbone(mode).eval()
        with torch.no_grad():
            before = model(images())
            handles = [module.register_forward_hook(lambda *_: 1 / 0) for _, module in called_modules(model)]
            with pytest.raises(ZeroDivisionError):
                model(images())
            for handle in handles:
                handle.remove()
            assert all(map(torch.equal, before, model(images())))

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
    def test_global_ones(self, kind, mode):
        model, counts = backbone(mode), Counter()
        register = getattr(global_hooks, f'register_module_{kind}_hook')
        with register(lambda module, *_: counts.update([module])):
            got = outputs_of(model, images(), gradients=mode == 'train' or 'backward' in kind)
        named = {module: name for name, module in model.named_modules()}
        assert {named[module]: count for module, count in counts.items()} == expected_calls(model)
        assert_close({key: got[key] for key in unchanged_outputs(mode) if key in got}, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_full_backward_hooks_on_every_module(self, mode):
        results = []
        for model, x in ((backbone(mode), images()), (float64_copy(backbone(mode)), images().double())):
            counts, seen = Counter(), {}

            def hook(name, counts, seen, module, *gradients):
                for kind, tensors in zip(('input', 'output'), gradients):
                    pairs = enumerate(tensor for tensor in tensors if tensor is not None)
                    seen.update({f'map {name} {counts[name]} {kind} {i}': tensor for i, tensor in pairs})
                counts[name] += 1

            for name, module in called_modules(model):
                module.register_full_backward_hook(partial(hook, name, counts, seen))
            results.append((outputs_of(model, x, gradients=True), seen))
            assert counts == expected_calls(model)
        for got, expected in zip(*results):
            assert_close(got, expected)

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize(
        'name', ['stages.1', f'{BLOCK}.channel_mixing.fc1', f'{BLOCK}.strip_mixing.fuse', f'{BLOCK}.channel_mixing.grn']
    )
    def test_backward_hooks_replace_gradients(self, name, mode):
        results = []
        for model, x in (
            (SecondStage(mode), SecondStage.input()),
            (float64_copy(SecondStage(mode)), SecondStage.input().double()),
        ):
            module = model.get_submodule(name)
            module.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0].flip(1),))
            results.append(outputs_of(model, x, gradients=True))
        assert_close(*results)
        untouched = float64_outputs(SecondStage(mode), SecondStage.input(), gradients=True)['grad of x']
        assert (results[0]['grad of x'] - untouched).abs().max() > 1e-2 * untouched.abs().max()

    @pytest.mark.parametrize('mode', MODES)
    def test_gradients_of_a_stage_for_grad_cam(self, mode):
        """Activations of a stage and their gradients, by a hook on the stage and one on its output."""
        results = []
        for model, x in ((backbone(mode), images()), (float64_copy(backbone(mode)), images().double())):
            seen = {}

            def store(module, inputs, output, seen=seen):
                seen['map'] = output.detach()
                output.register_hook(lambda grad: seen.update({'map of grad': grad}))

            model.stages[-1].register_forward_hook(store)
            loss_of(model(x)).backward()
            results.append(seen)
        assert results[0].keys() == {'map', 'map of grad'}
        assert_close(*results)

    def test_with_checkpoints_they_fire_once_more(self):
        model = backbone('train', with_cp=True)
        seen = Seen(model)
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            assert_close(outputs_of(model, images()), float64_outputs(backbone('train'), images()))
        for name, count in seen.counts().items():
            again = name.startswith('stages.') and len(name.split('.')) > 2
            assert count == expected_calls(model)[name] * (1 + again), name


OWN_FORWARDS = [flip_by_subclass, flip_by_patched_forward]


class TestLayersOfOnesOwn:
    @pytest.mark.parametrize('mode, name', [case for case in EVERY_NAME if case.values[1] != ''])
    def test_forward_of_a_subclass_runs(self, mode, name):
        model, x = part_with(mode, name)
        flip_by_subclass(model.get_submodule(name))
        assert_close(outputs_of(model, x, gradients=False), flipped_by_hook(mode, name))

    @pytest.mark.parametrize('mode, name', [case for case in in_modes('eval', 'deploy') if case.values[1] != ''])
    def test_patched_forward_runs(self, mode, name):
        model, x = part_with(mode, name)
        flip_by_patched_forward(model.get_submodule(name))
        assert_close(outputs_of(model, x, gradients=False), flipped_by_hook(mode, name))

    @pytest.mark.parametrize('flip', OWN_FORWARDS)
    @pytest.mark.parametrize('name', [name for name in NAMES['eval'] if name.startswith(f'{BLOCK}.')] + ['stages.1'])
    def test_before_deploy_they_are_kept_or_refused(self, name, flip):
        model = backbone('eval')
        flip(model.get_submodule(name))
        if deployed_or_refused(model, [name]):
            assert_close(outputs_of(model.stages[1], SecondStage.input()), flipped_by_hook('eval', name))

    @pytest.mark.parametrize('name', BOXES)
    def test_gradients_of_subclasses(self, name):
        model, reference = SecondStage('train'), float64_copy(SecondStage('train'))
        flip_by_subclass(module_of_block(model, BOXES[name]))
        flip_by_hook(module_of_block(reference, BOXES[name]))
        assert_close(outputs_of(model, SecondStage.input()), outputs_of(reference, SecondStage.input().double()))

    @pytest.mark.parametrize('mode', MODES)
    def test_subclasses_without_changes_give_the_same(self, mode):
        model = backbone(mode)
        for module in model.modules():
            module.__class__ = type(f'My{type(module).__name__}', (type(module),), {})
        assert_close(outputs_of(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_layer_replaced_by_identity(self, mode):
        for name in ('channel_mixing', 'strip_mixing.branches.lsmm', 'strip_mixing.depthwise', 'channel_mixing.grn'):
            model = replace_in_block(SecondStage(mode), name, nn.Identity())
            assert_changed(assert_matches_float64(model, SecondStage.input()), unchanged_outputs(mode, 'stage'))

    @pytest.mark.parametrize('mode', MODES)
    def test_dropout_in_channel_mixing(self, mode):
        """Dropout that drops nothing, after the activation."""
        model = replace_in_block(SecondStage(mode), 'channel_mixing.act', nn.Sequential(nn.GELU(), nn.Dropout(0.0)))
        assert_matches_float64(model, SecondStage.input())
        model = replace_in_block(SecondStage('train'), 'channel_mixing.act', nn.Sequential(nn.GELU(), nn.Dropout(0.5)))
        assert_changed(outputs_of(model, SecondStage.input(), gradients=False), unchanged_outputs('train', 'stage'))


def conv(old, **changes):
    """A convolution like another one but for some arguments; its weights are kept where they fit."""
    names = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')
    arguments = {**{name: getattr(old, name) for name in names}, 'bias': old.bias is not None, **changes}
    new = nn.Conv2d(**arguments)
    if new.weight.shape == old.weight.shape:
        with torch.no_grad():
            new.weight.copy_(old.weight)
    return new


def replace_by(make):
    """A change that puts ``make(old layer)`` in place of a layer."""
    return lambda model, name: replace_in_block(model, name, make(module_of_block(model, name)))


def assign(**values):
    """A change of a layer's attributes."""

    def change(model, name):
        for attribute, value in values.items():
            setattr(module_of_block(model, name), attribute, value)

    return change


def circular(old):
    return conv(old, padding_mode='circular')


def dilated(old):
    return conv(old, dilation=2, padding=tuple(2 * side for side in old.padding))


def biased(old):
    return conv(old, bias=True)


def grouped(old):
    return conv(old, groups=2)


def without_bias(old):
    return conv(old, bias=False)


DEPTHWISE = (
    'strip_mixing.depthwise.2',
    'strip_mixing.branches.lsmm.tall',
    'strip_mixing.branches.lsmm.wide',
    'channel_mixing.depthwise',
)
BATCH_NORMS = 'strip_mixing.depthwise.0', 'strip_mixing.project.1', 'strip_mixing.branches.cgsmm.norm'
ACTIVATIONS = (
    'strip_mixing.depthwise.1',
    'strip_mixing.project.2',
    'strip_mixing.branches.cgsmm.act',
    'strip_mixing.branches.lsmm.reweight.1',
    'channel_mixing.act',
)
BIASED = [name for name in POINTWISE if name.split('.')[-2] in ('project', 'reweight')]


class WeightOfItsOwn(torch.Tensor):
    """A weight that decides itself what a linear layer is, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function is nn.functional.linear:
            x, weight, bias = arguments
            return nn.functional.linear(x, weight.as_subclass(torch.Tensor).flip(0), bias)
        return super().__torch_function__(function, types, arguments, named)


def linear_without_bias(old):
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    return new


def batch_norm(**arguments):
    def make(old):
        new = nn.BatchNorm2d(old.num_features, **arguments)
        new.load_state_dict(old.state_dict(), strict=False)
        return new.train(old.training)

    return make


def layer_norm(**arguments):
    def make(old):
        new = nn.LayerNorm(old.normalized_shape, **arguments)
        new.load_state_dict(old.state_dict(), strict=False)
        return new

    return make


OTHER_LAYERS = {
    **{f'{name} circular': (name, replace_by(circular)) for name in DEPTHWISE},
    **{f'{name} dilated': (name, replace_by(dilated)) for name in DEPTHWISE},
    **{f'{name} with bias': (name, replace_by(biased)) for name in (*DEPTHWISE, 'strip_mixing.fuse')},
    **{f'{name} with bias': (name, replace_by(biased)) for name in POINTWISE[1:3]},
    **{f'{name} in groups': (name, replace_by(grouped)) for name in POINTWISE[:6]},
    **{f'{name} without bias': (name, replace_by(without_bias)) for name in BIASED},
    **{f'{name} without bias': (name, replace_by(linear_without_bias)) for name in POINTWISE[6:]},
    'depthwise.2 of 5x5': (DEPTHWISE[0], replace_by(lambda old: conv(old, kernel_size=5, padding=2))),
    'channel_mixing.depthwise of 3x3': (DEPTHWISE[3], replace_by(lambda old: conv(old, kernel_size=3, padding=1))),
    'channel_mixing.depthwise of 9x9': (DEPTHWISE[3], replace_by(lambda old: conv(old, kernel_size=9, padding=4))),
    'lsmm.tall of 3x3': (DEPTHWISE[1], replace_by(lambda old: conv(old, kernel_size=3, padding=1))),
    'channel_mixing.depthwise dense': (DEPTHWISE[3], replace_by(lambda old: conv(old, groups=1))),
    'fuse of 3x3': ('strip_mixing.fuse', replace_by(lambda old: conv(old, kernel_size=3, padding=1))),
    **{f'{name} with another eps': (name, assign(eps=0.5)) for name in (*BATCH_NORMS, 'channel_mixing.norm')},
    'grn with another eps': ('channel_mixing.grn', assign(eps=5.0)),
    **{f'{name} without affine part': (name, replace_by(batch_norm(affine=False))) for name in BATCH_NORMS},
    **{f'{name} of the batch': (name, replace_by(batch_norm(track_running_stats=False))) for name in BATCH_NORMS},
    **{f'{name} of groups': (name, replace_by(lambda old: nn.GroupNorm(4, old.num_features))) for name in BATCH_NORMS},
    'LayerNorm without affine part': ('channel_mixing.norm', replace_by(layer_norm(elementwise_affine=False))),
    'LayerNorm without bias': ('channel_mixing.norm', replace_by(layer_norm(bias=False))),
    'LayerNorm replaced by tanh': ('channel_mixing.norm', replace_by(lambda old: nn.Tanh())),
    **{f'{name} Tanh': (name, replace_by(lambda old: nn.Tanh())) for name in ACTIVATIONS},
}  # fmt: skip
# In training all norms use the statistics of the batch, and those after a layer subtract its bias.
SAME_IN_TRAINING = [
    *(case for case in OTHER_LAYERS if case.endswith('of the batch')),
    'strip_mixing.depthwise.2 with bias',
    'strip_mixing.branches.cgsmm.fuse_row with bias',
    'strip_mixing.project.0 without bias',
]
SAME_IN_DEPLOY = ['LayerNorm without affine part', 'LayerNorm without bias']  # nothing is left of them there


class TestOtherHyperparameters:
    """Layers of the usual kinds that compute something else than the stock ones."""

    @pytest.mark.parametrize('case, mode', in_all_modes(OTHER_LAYERS, lambda case: OTHER_LAYERS[case][0]))
    def test_of_one_layer(self, case, mode):
        name, change = OTHER_LAYERS[case]
        model = SecondStage(mode)
        change(model, name)
        expected = assert_matches_float64(model, SecondStage.input())
        if case not in dict(train=SAME_IN_TRAINING, eval=(), deploy=SAME_IN_DEPLOY)[mode]:
            assert_changed(expected, unchanged_outputs(mode, 'stage'))

    @pytest.mark.parametrize('case', OTHER_LAYERS)
    def test_before_deploy_it_is_kept_or_refused(self, case):
        name, change = OTHER_LAYERS[case]
        model = backbone('eval')
        change(model, name)
        expected = float64_outputs(model.stages[1], SecondStage.input())
        if deployed_or_refused(model, [f'{BLOCK}.{name}']):
            assert_close(outputs_of(model.stages[1], SecondStage.input()), expected)

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', ACTIVATIONS)
    def test_gelu_by_tanh(self, name, mode):
        """It differs from the exact one by 5e-4 at most, so that inputs are brought there, and tolerances are tight."""
        model = SecondStage(mode)
        replace_in_block(model, name, nn.GELU(approximate='tanh'))
        layer, reference = module_of_block(model, name), float64_copy(model)
        assert_close(
            outputs_of(model, SecondStage.input()),
            outputs_of(reference, SecondStage.input().double()),
            tolerance=5e-6 if mode != 'train' else 1e-4,
        )
        kept = []
        layer.register_forward_hook(lambda module, inputs, output: kept.append((inputs[0], output)))
        outputs_of(model, SecondStage.input())
        assert torch.equal(nn.functional.gelu(kept[0][0], approximate='tanh'), kept[0][1])

    @pytest.mark.parametrize('momentum', [0.7, None])
    @pytest.mark.parametrize('name', BATCH_NORMS)
    def test_momentum_of_one_norm(self, name, momentum):
        model = SecondStage('train')
        module_of_block(model, name).momentum = momentum
        reference = float64_copy(model)
        for seed in (0, 1):
            outputs_of(model, SecondStage.input(seed=seed))
            outputs_of(reference, SecondStage.input(seed=seed).double())
        got, expected = module_of_block(model, name), module_of_block(reference, name)
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(got.state_dict()[key].to(value), value, rtol=1e-4, atol=1e-5)
        assert_matches_float64(model.eval(), SecondStage.input())

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', [*BATCH_NORMS[:1], 'channel_mixing.norm', 'channel_mixing.grn'])
    def test_an_eps_assigned_after_a_forward(self, name, mode):
        """In one of two blocks of a stage."""
        model = backbone(mode)
        outputs_of(model, images())
        model.stages[2][1].get_submodule(name).eps = 0.5
        assert_changed(assert_matches_float64(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_padding_mode_assigned_after_a_forward(self, mode):
        model = SecondStage(mode)
        outputs_of(model, SecondStage.input())
        layer = module_of_block(model, 'channel_mixing.depthwise')
        layer.dilation, layer.padding = (2, 2), (6, 6)
        assert_changed(assert_matches_float64(model, SecondStage.input()), unchanged_outputs(mode, 'stage'))

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', [*BATCH_NORMS, 'channel_mixing.norm'])
    def test_norms_of_one_box_in_another_mode(self, name, mode):
        """A norm that alone is frozen in training, or that alone trains in evaluation."""
        model = SecondStage(mode)
        module = module_of_block(model, name)
        module.train(mode != 'train')
        before = copy.deepcopy(module.state_dict())
        expected = assert_matches_float64(model, SecondStage.input())
        if isinstance(module, nn.BatchNorm2d):
            assert_changed(expected, unchanged_outputs(mode, 'stage'))
            moved = not torch.equal(before['running_mean'], module.state_dict()['running_mean'])
            assert moved == (mode != 'train')


class TestWrappers:
    WRAPPED = ['', 'channel_mixing', 'strip_mixing', 'strip_mixing.branches.cgsmm', 'strip_mixing.branches.lsmm']

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', [*WRAPPED, 'channel_mixing.fc1', 'channel_mixing.grn', 'strip_mixing.fuse'])
    def test_checkpoint_wrapper(self, name, mode):
        model = SecondStage(mode)
        replace_in_block(model, name, checkpoint_wrapper(module_of_block(model, name)))
        got = outputs_of(model, SecondStage.input())
        prefix = '_checkpoint_wrapped_module.'
        assert_close({key.replace(prefix, ''): value for key, value in got.items()}, unchanged_outputs(mode, 'stage'))
        assert model.state_dict().keys() == SecondStage(mode).state_dict().keys()

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', ['channel_mixing', 'strip_mixing.branches.lsmm', 'channel_mixing.fc2'])
    def test_compiled_in_place_of_a_box(self, name, mode):
        torch._dynamo.reset()
        model = SecondStage(mode)
        replace_in_block(model, name, torch.compile(module_of_block(model, name), backend='eager'))
        got = outputs_of(model, SecondStage.input())
        assert_close(
            {key.replace('_orig_mod.', ''): value for key, value in got.items()}, unchanged_outputs(mode, 'stage')
        )

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('name', ['channel_mixing', 'strip_mixing.branches.lsmm', 'channel_mixing.grn'])
    def test_compiled_in_place(self, name, mode):
        """The compiled form is what runs. (Of PyTorch's own layers Dynamo compiles nothing.)"""
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        model = SecondStage(mode)
        module_of_block(model, name).compile(backend=backend)
        assert_close(outputs_of(model, SecondStage.input()), unchanged_outputs(mode, 'stage'))
        assert graphs

    @pytest.mark.parametrize(
        'arguments', [{}, dict(out_indices=(3,), img_size=64)], ids=['three stages', 'four stages']
    )
    def test_fuse_conv_bn(self, arguments):
        model = backbone('eval', **arguments)
        expected = float64_outputs(model, images(2, 3, 64, 64))
        fused = fuse_conv_bn(model)
        assert_close(outputs_of(fused, images(2, 3, 64, 64)), expected)
        assert not isinstance(module_of_block(fused, 'strip_mixing.project.1'), nn.BatchNorm2d)

    def test_fuse_conv_bn_then_deploy(self):
        model = backbone('eval')
        fuse_conv_bn(model).switch_to_deploy()
        assert_close(outputs_of(model, images()), unchanged_outputs('eval'))

    def test_sync_batch_norm(self):
        """Without a process group it is batch norm."""
        for mode in ('train', 'eval'):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(backbone(mode))
            assert isinstance(module_of_block(model, BATCH_NORMS[0]), nn.SyncBatchNorm)
            model.eval()
            assert_close(outputs_of(model, images()), float64_outputs(backbone(mode).eval(), images()))

    @pytest.mark.parametrize('norm', ['SyncBN', 'BN'])
    def test_batch_norm_of_configs_is_folded(self, norm):
        """As it is built, and as mmengine's Runner turns it without a process group."""
        for change in (lambda model: model, revert_sync_batchnorm):
            model = change(backbone('eval', norm_cfg=dict(type=norm)))
            expected = float64_outputs(model, images())
            model.switch_to_deploy()
            assert type(module_of_block(model, 'strip_mixing.project.1')) is nn.Identity
            assert type(module_of_block(model, 'strip_mixing.depthwise.0')) is nn.BatchNorm2d
            assert_close(outputs_of(model, images()), expected)

    @pytest.mark.parametrize('mode', MODES)
    def test_data_parallel_without_gpus(self, mode):
        got = outputs_of(nn.DataParallel(backbone(mode)), images(), gradients=mode == 'train')
        assert_close({key.replace('module.', ''): value for key, value in got.items()}, unchanged_outputs(mode))


def weighted(model, names=None):
    """Convolutions and linear layers of a model."""
    kinds = nn.Conv2d, nn.Linear
    return [module for name, module in model.named_modules() if isinstance(module, kinds) and 'stages' in name]


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return nn.utils.weight_norm(module)


class Flipped(nn.Module):
    def forward(self, weight):
        return weight.flip(0)


PARAMETRISED = (
    'channel_mixing.fc1.weight',
    'channel_mixing.fc2.bias',
    'channel_mixing.grn.gamma',
    'channel_mixing.norm.weight',
    'channel_mixing.depthwise.weight',
    'strip_mixing.depthwise.0.bias',
    'strip_mixing.branches.cgsmm.row.weight',
    'strip_mixing.branches.cgsmm.position_column.table',
    'strip_mixing.branches.lsmm.tall.weight',
)


def layer_of(tensor):
    return tensor.rpartition('.')[0]


def tensor_of(tensor):
    return tensor.rpartition('.')[2]


class TestParametrizations:
    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('kind', ['new', 'old'])
    def test_weight_norm(self, kind, mode):
        models = [backbone(mode), float64_copy(backbone(mode))]
        for model in models:
            for layer in weighted(model):
                (parametrizations.weight_norm if kind == 'new' else old_weight_norm)(layer)
                with torch.no_grad():
                    scale = layer.parametrizations.weight.original0 if kind == 'new' else layer.weight_g
                    scale.mul_(1.3)
        got, expected = outputs_of(models[0], images()), outputs_of(models[1], images().double())
        assert_close(got, expected)
        assert_changed(got, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize(
        'spectral_norm', [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=['new', 'old']
    )
    def test_spectral_norm(self, spectral_norm, mode):
        models = [backbone(mode), float64_copy(backbone(mode))]
        for model in models:
            torch.manual_seed(0)
            for layer in weighted(model):
                spectral_norm(layer)
            model.train(mode == 'train')
        for one, other in zip(*(model.buffers() for model in models)):  # the same start of the power iteration
            other.copy_(one)
        got, expected = outputs_of(models[0], images()), outputs_of(models[1], images().double())
        assert_close(got, expected, tolerance=1e-3)
        assert_changed(got, unchanged_outputs(mode))

    @pytest.mark.parametrize('tensor, mode', in_all_modes(PARAMETRISED, layer_of, tensor_of))
    def test_of_ones_own(self, tensor, mode):
        name, attribute = layer_of(tensor), tensor_of(tensor)
        model = SecondStage(mode)
        module = module_of_block(model, name)
        parametrize.register_parametrization(module, attribute, Flipped())
        expected = float64_copy(SecondStage(mode))
        tensor = getattr(module_of_block(expected, name), attribute)
        tensor.data = tensor.data.flip(0)
        expected = outputs_of(expected, SecondStage.input().double(), gradients=False)
        assert_close(outputs_of(model, SecondStage.input(), gradients=False), expected)
        assert_changed(expected, unchanged_outputs(mode, 'stage'))
        parametrize.remove_parametrizations(module, attribute)
        assert_close(outputs_of(model, SecondStage.input(), gradients=False), expected)

    @pytest.mark.parametrize('name', ['strip_mixing.project.0', 'channel_mixing.fc1', 'channel_mixing.fc2'])
    def test_before_deploy_they_are_kept_or_refused(self, name):
        model = backbone('eval')
        parametrize.register_parametrization(module_of_block(model, name), 'weight', Flipped())
        expected = float64_outputs(model, images())
        if deployed_or_refused(model, [f'{BLOCK}.{name}']):
            assert_close(outputs_of(model, images()), expected)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['channel_mixing.fc1', 'channel_mixing.fc2'])
def test_weights_of_another_class(name, mode):
    model, reference = SecondStage(mode), float64_copy(SecondStage(mode))
    layer = module_of_block(model, name)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(WeightOfItsOwn), requires_grad=False)
    weight = module_of_block(reference, name).weight
    weight.data = weight.data.flip(0)
    expected = outputs_of(reference, SecondStage.input().double(), gradients=False)
    assert_close(outputs_of(model, SecondStage.input(), gradients=False), expected)
    assert_changed(expected, unchanged_outputs(mode, 'stage'))


class TestPruning:
    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('steps', [1, 2])
    def test_masks_are_used(self, steps, mode):
        """Of all convolutions and linear layers, and after the masks are made permanent."""
        model, reference = backbone(mode), float64_copy(backbone(mode))
        for layer, expected in zip(weighted(model), weighted(reference)):
            for step in range(steps):
                if step:
                    prune.ln_structured(layer, 'weight', amount=1, n=2, dim=0)
                else:
                    prune.l1_unstructured(layer, 'weight', amount=0.5)
            expected.weight.data.mul_(layer.weight_mask)
        expected = outputs_of(reference, images().double(), gradients=False)
        assert_close(outputs_of(model, images(), gradients=False), expected)
        assert_changed(expected, unchanged_outputs(mode))
        for layer in weighted(model):
            prune.remove(layer, 'weight')
        assert_close(outputs_of(model, images(), gradients=False), expected)

    def test_masked_weights_get_no_gradient(self):
        model, reference = backbone('train'), float64_copy(backbone('train'))
        for layer, expected in zip(weighted(model), weighted(reference)):
            prune.random_unstructured(layer, 'weight', amount=0.5)
            expected.weight.data.mul_(layer.weight_mask)
        got, expected = outputs_of(model, images()), outputs_of(reference, images().double())
        for layer, other in zip(weighted(model), weighted(reference)):
            mask = layer.weight_mask
            gradients = {'grad': layer.weight_orig.grad}, {'grad': other.weight.grad * mask}
            assert_close(*gradients)
        assert_close({'map': got['map 2']}, {'map': expected['map 2']})

    @pytest.mark.parametrize('name', ['channel_mixing.grn', 'strip_mixing.branches.cgsmm.row'])
    def test_of_other_parameters(self, name):
        model, reference = backbone('eval'), float64_copy(backbone('eval'))
        attribute = 'gamma' if name.endswith('grn') else 'weight'
        prune.l1_unstructured(module_of_block(model, name), attribute, amount=0.7)
        mask = getattr(module_of_block(model, name), f'{attribute}_mask')
        getattr(module_of_block(reference, name), attribute).data.mul_(mask)
        assert_close(outputs_of(model, images()), outputs_of(reference, images().double()))

    def test_a_pruned_model_is_deployed_or_refused(self):
        model = backbone('eval')
        layer = module_of_block(model, 'channel_mixing.fc1')
        prune.l1_unstructured(layer, 'weight', amount=0.5)
        reference = float64_copy(backbone('eval'))
        module_of_block(reference, 'channel_mixing.fc1').weight.data.mul_(layer.weight_mask)
        expected = outputs_of(reference, images().double())
        if deployed_or_refused(model, [f'{BLOCK}.channel_mixing.fc1']):
            assert_close(outputs_of(model, images()), expected)
