"""The modules as any PyTorch user treats them: adapters, hooks, layers of one's own, wrappers.

Whatever stands in the place of a layer is what runs, in training, in evaluation and in the deploy form.
"""

import copy
import functools
import pickle
import re
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
from helpers import operators_of
from helpers.behaviours import (
    BLOCK,
    CGSMM,
    LSMM,
    MODES,
    SecondStage,
    assert_changed,
    assert_close,
    assert_matches_float64,
    backbone,
    called_modules,
    float64_copy,
    float64_outputs,
    images,
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
from torch.nn.utils import parametrizations, parametrize, prune

import mmstrip
from mmstrip.models.strip_mixing import RelativePosition
from mmstrip.ops.fast import Fast

DEPTHWISE = 'strip_mixing.depthwise.2', f'{LSMM}.tall', f'{LSMM}.wide', 'channel_mixing.depthwise'
BATCH_NORMS = 'strip_mixing.depthwise.0', 'strip_mixing.project.1', f'{CGSMM}.norm'
NORM, GRN = 'channel_mixing.norm', 'channel_mixing.grn'
ACTIVATIONS = (
    *('strip_mixing.depthwise.1', 'strip_mixing.project.2', f'{CGSMM}.act', f'{LSMM}.reweight.1'),
    'channel_mixing.act',
)
# 1x1 convolutions with and without bias, and linear layers.
BIASED = 'strip_mixing.project.0', f'{LSMM}.reweight.0', f'{LSMM}.reweight.2'
UNBIASED = f'{CGSMM}.fuse_row', f'{CGSMM}.fuse_column', 'strip_mixing.fuse'
LINEAR = 'channel_mixing.fc1', 'channel_mixing.fc2'


class LoRA(nn.Module):
    """A layer plus a product of two thin ones; it shows the layer's weight as its own, as PEFT's adapters do."""

    def __init__(self, layer: nn.Module, rank: int = 2):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
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


class Flipped(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight.flip(0)


class WeightOfItsOwn(torch.Tensor):
    """A weight that decides itself what a layer computes, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function in (nn.functional.linear, nn.functional.conv1d):
            x, weight, *others = arguments
            return function(x, weight.as_subclass(torch.Tensor).flip(0), *others, **(named or {}))
        return super().__torch_function__(function, types, arguments, named)

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone().as_subclass(WeightOfItsOwn), requires_grad=False)


# Changes of a module: they return what takes its place, or change it and return None.


def flipped(output):
    """What the tests make of an output: channels (or rows) backwards."""
    return tuple(part.flip(1) for part in output) if isinstance(output, tuple) else output.flip(1)


def flip_by_hook(module):
    module.register_forward_hook(lambda module, inputs, output: flipped(output))


def flip_by_pre_hook(module):
    module.register_forward_pre_hook(lambda module, inputs: flipped(inputs))


def flip_by_subclass(module):
    base = type(module)
    forward = lambda self, *inputs, **named: flipped(base.forward(self, *inputs, **named))  # noqa: E731
    module.__class__ = type(f'Flipped{base.__name__}', (base,), dict(forward=forward))


def flip_by_patched_forward(module):
    module.forward = functools.partial(call_flipped, module)  # a partial is copied with its module


def call_flipped(module, *inputs, **named):
    return flipped(type(module).forward(module, *inputs, **named))


FLIPS = flip_by_hook, flip_by_pre_hook, flip_by_subclass, flip_by_patched_forward


def conv(**changes):
    """A convolution like another one but for some arguments; its weights are kept where they fit."""
    names = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')

    def make(old):
        arguments = {**{name: getattr(old, name) for name in names}, 'bias': old.bias is not None, **changes}
        new = nn.Conv2d(**arguments)
        if new.weight.shape == old.weight.shape:
            new.weight.data.copy_(old.weight)
        return new

    return make


def dilated(old):
    return conv(dilation=2, padding=tuple(2 * side for side in old.padding))(old)


def other(kind, size, **arguments):
    """A layer of a kind and of the size that an attribute tells, with the tensors that there are."""

    def make(old):
        new = kind(*(getattr(old, name) for name in size), **arguments)
        new.load_state_dict({key: value for key, value in old.state_dict().items() if key in new.state_dict()})
        return new

    return make


def assign(**values):
    def change(module):
        for name, value in values.items():
            setattr(module, name, value)

    return change


def cut_hidden_channels(mixing):
    """By smaller tensors, as pruning of channels does; layers do not ask for their sizes."""
    tensors = ('fc1', 'weight', 0), ('fc1', 'bias', 0), ('grn', 'gamma', 0), ('grn', 'beta', 0), ('fc2', 'weight', 1)
    for layer, name, dim in tensors:
        layer = mixing.get_submodule(layer)
        if getattr(layer, name) is not None:
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().narrow(dim, 0, 37)))


def share_first_rows(module):
    for parameter in module.parameters():
        parameter.data = parameter.data[:1].expand(parameter.shape)


def append_tanh(sequential):
    sequential.append(nn.Tanh())


def scaled_copy(module):
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    return module


def parametrized(tensor):
    return lambda module: parametrize.register_parametrization(module, tensor, Flipped())


def with_a_weight_of_its_own(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(WeightOfItsOwn), requires_grad=False)


def wide_parameter(vector):
    return nn.Parameter(2 * vector[None, None, None])


def subclass_by(**methods):
    def change(module):
        module.__class__ = type('Mine', (type(module),), methods)

    return change


def pruned(tensor):
    return lambda module: prune.l1_unstructured(module, tensor, amount=0.7)


def constant_convolution(conv):
    """Seamless tiling patches what nn.Conv2d.forward calls."""
    conv._conv_forward = lambda x, weight, bias: x.new_ones(len(x), len(weight), *x.shape[2:])


# What is done to which modules of a block.
EVERY_MODULE = [
    name.removeprefix(f'{BLOCK}.').replace(BLOCK, '') for name, _ in called_modules(SecondStage()) if BLOCK in name
]
CHANGES = {
    f'{what}: {name}': (name, change)
    for what, names, change in (
        *((flip.__name__, EVERY_MODULE, flip) for flip in FLIPS),
        ('circular', DEPTHWISE, conv(padding_mode='circular')),
        ('dilated', DEPTHWISE, dilated),
        ('dilated by assignment', DEPTHWISE[3:], assign(dilation=(2, 2), padding=(6, 6))),
        ('with bias', (*DEPTHWISE, *UNBIASED), conv(bias=True)),
        ('in groups', (*BIASED, *UNBIASED), conv(groups=2)),
        ('without bias', BIASED, conv(bias=False)),
        ('without bias', LINEAR, other(nn.Linear, ('in_features', 'out_features'), bias=False)),
        ('of 3x3', ('strip_mixing.fuse', *DEPTHWISE[1:]), conv(kernel_size=3, padding=1)),
        ('of 5x5', DEPTHWISE[:1], conv(kernel_size=5, padding=2)),
        ('of 9x9', DEPTHWISE[3:], conv(kernel_size=9, padding=4)),
        ('dense', DEPTHWISE[3:], conv(groups=1)),
        ('another eps', (*BATCH_NORMS, NORM), assign(eps=0.5)),
        ('another eps', (GRN,), assign(eps=5.0)),
        ('without affine part', BATCH_NORMS, other(nn.BatchNorm2d, ('num_features',), affine=False)),
        ('of the batch', BATCH_NORMS, other(nn.BatchNorm2d, ('num_features',), track_running_stats=False)),
        ('training', BATCH_NORMS, nn.Module.train),
        ('reset', BATCH_NORMS, nn.BatchNorm2d.reset_running_stats),
        ('of groups', BATCH_NORMS, lambda old: nn.GroupNorm(4, old.num_features)),
        ('without affine part', (NORM,), other(nn.LayerNorm, ('normalized_shape',), elementwise_affine=False)),
        ('without bias', (NORM,), other(nn.LayerNorm, ('normalized_shape',), bias=False)),
        ('Tanh', (NORM, *ACTIVATIONS), lambda old: nn.Tanh()),
        ('Identity', ('channel_mixing', LSMM, 'strip_mixing.depthwise', GRN), lambda old: nn.Identity()),
        ('LoRA', (*BIASED, *UNBIASED, *LINEAR), LoRA),
        ('a map of gammas', (GRN,), lambda grn: assign(gamma=wide_parameter(grn.gamma), beta=None)(grn)),
        ('an adapter after', ('', 'channel_mixing', 'strip_mixing', LSMM), lambda old: nn.Sequential(old, nn.Tanh())),
        ('appended to', ('strip_mixing.depthwise', 'strip_mixing.project', f'{LSMM}.reweight'), append_tanh),
        ('scaled copy', ('channel_mixing.fc2', 'channel_mixing', LSMM, 'strip_mixing', ''), scaled_copy),
        ('shared memory', ('',), share_first_rows),
        ('hidden channels cut off', ('channel_mixing',), cut_hidden_channels),
        ('parametrized', ('channel_mixing.fc1', *DEPTHWISE[3:], NORM, f'{CGSMM}.row'), parametrized('weight')),
        ('parametrized', ('channel_mixing.fc2', BATCH_NORMS[0]), parametrized('bias')),
        ('parametrized', (f'{CGSMM}.position_column',), parametrized('table')),
        ('parametrized', (GRN,), parametrized('gamma')),
        ('a weight of another class', (*LINEAR, f'{CGSMM}.row'), with_a_weight_of_its_own),
        ('pruned', ('strip_mixing.project.0', 'channel_mixing.fc1', f'{CGSMM}.row'), pruned('weight')),
        ('patched', (*DEPTHWISE, 'strip_mixing.fuse'), constant_convolution),
        ('a method of its own', (CGSMM,), assign(mix_window=lambda u: 2 * u)),
        ('a method of a subclass', (CGSMM,), subclass_by(mix_window=lambda self, u: 2 * u)),
    )
    for name in names
}


def apply(case, model):
    """Change a module of the second stage's block; its name."""
    name, change = CHANGES[case]
    module = module_of_block(model, name)
    with torch.no_grad():  # else weights that are computed have a graph and cannot be copied
        new = change(module)
    if isinstance(new, nn.Module):
        replace_in_block(model, name, new.train(module.training))
    return name


def has_effect(case, mode):
    """Of the deploy form, some layers and the affine part of LayerNorm are gone."""
    name, _ = CHANGES[case]
    of_affine_part = name == NORM and not case.startswith(('another eps', 'Tanh'))
    gone = of_affine_part or isinstance(module_of_block(DEPLOYED, name), nn.Identity)
    return mode == 'eval' or case.startswith('flip') or not gone


DEPLOYED = SecondStage('deploy')


@pytest.mark.parametrize(
    'case, mode', [(case, mode) for mode in MODES[1:] for case in CHANGES if has_effect(case, mode)]
)
def test_a_changed_module_is_followed(case, mode):
    """Changed after a forward."""
    model = SecondStage(mode)
    outputs_of(model, SecondStage.input())
    apply(case, model)
    assert_changed(assert_matches_float64(model, SecondStage.input()), unchanged_outputs(mode, 'stage'))


@pytest.mark.parametrize('mode', MODES[1:])
def test_gelu_by_tanh_is_followed(mode):
    """It is so close to the exact one that the tolerance is tight."""
    model, x = SecondStage(mode), SecondStage.input()
    outputs_of(model, x)
    module_of_block(model, 'channel_mixing.act').approximate = 'tanh'
    expected = assert_matches_float64(model, x, tolerance=5e-6)['map 0']
    assert (expected - unchanged_outputs(mode, 'stage')['map 0']).abs().max() > 1.5e-5 * expected.abs().max()


@pytest.mark.parametrize('case', [case for case in CHANGES if not case.startswith(('training', 'shared'))])
def test_a_changed_module_is_deployed_or_refused_by_name(case):
    model = backbone('eval')
    name = apply(case, model)
    expected = float64_outputs(model.stages[1], SecondStage.input())
    if deployed_or_refused(model, f'{BLOCK}.{name}'):
        assert_close(outputs_of(model.stages[1], SecondStage.input()), expected)


def deployed_or_refused(model, name):
    """Switch a model to its deploy form; False if it is refused, with the name of a layer, and nothing is folded."""
    before = {key: value.clone() for key, value in model.eval().state_dict().items()}
    try:
        model.switch_to_deploy()
    except ValueError as error:
        assert re.search(rf'\b{re.escape(name.rstrip("."))}\b', str(error)), error
        assert not model.deploy and before.keys() == model.state_dict().keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return False
    return True


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('flip', FLIPS)
def test_a_flipped_stage_is_followed(flip, mode):
    model = SecondStage(mode)
    flip(model.stages['1'])
    assert_changed(assert_matches_float64(model, SecondStage.input()), unchanged_outputs(mode, 'stage'))


# Hooks.


class Seen:
    """What hooks on modules see: inputs, outputs and their gradients, by name, call and place, and copies of them."""

    def __init__(self, model, names):
        self.tensors, self.copies, self.counts = {}, {}, Counter()
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(partial(self._store, f'{name} inputs'))
            module.register_forward_hook(lambda module, x, y, name=name: self._store(f'{name} output', module, y))
            module.register_full_backward_hook(partial(self._store, f'{name} gradients'))

    def _store(self, what, module, *tensors):
        for i, tensor in enumerate(torch.utils._pytree.tree_leaves(tensors)):
            if tensor is not None:
                key = f'map {what} {self.counts[what]} {i}'
                self.tensors[key], self.copies[key] = tensor.detach(), tensor.detach().clone()
        self.counts[what] += 1


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('hooked', ['all modules', 'boxes'])
def test_hooks_fire_on_every_module_and_see_what_is_right(mode, hooked):
    """Which stays as it is; layers that are hooked are called, boxes may run on operators."""
    modules = {
        name: module for name, module in called_modules(backbone(mode)) if hooked != 'boxes' or isinstance(module, Fast)
    }
    results = []
    for model, x in ((backbone(mode), images()), (float64_copy(backbone(mode)), images().double())):
        seen = Seen(model, modules)
        results.append((outputs_of(model, x, gradients=True), seen.tensors))
        assert all(torch.equal(tensor, seen.copies[key]) for key, tensor in seen.tensors.items())
        for name, module in modules.items():  # each module runs once; drop path serves both branches of a block
            times = 2 if isinstance(module, DropPath) else 1
            assert [seen.counts[f'{name} {what}'] for what in ('inputs', 'output', 'gradients')] == [times] * 3, name
    for got, expected in zip(*results):
        assert_close(got, expected)


@pytest.mark.parametrize('mode', ['eval', 'deploy'])
@pytest.mark.parametrize('kind', ['_pre', ''])
@pytest.mark.parametrize('name', ['', 'channel_mixing.fc1', 'strip_mixing.fuse', f'{LSMM}.tall'])
def test_backward_hooks_replace_gradients(name, kind, mode):
    results = []
    for model, x in (
        (SecondStage(mode), SecondStage.input()),
        (float64_copy(SecondStage(mode)), SecondStage.input().double()),
    ):
        register = getattr(module_of_block(model, name), f'register_full_backward{kind}_hook')
        register(lambda module, gradients, *_: (gradients[0].flip(1),))
        results.append(outputs_of(model, x, gradients=True))
    assert_close(*results)
    untouched = float64_outputs(SecondStage(mode), SecondStage.input(), gradients=True)['grad of x']
    assert (results[0]['grad of x'] - untouched).abs().max() > 1e-3 * untouched.abs().max()


@pytest.mark.parametrize('mode', MODES[1:])
def test_what_is_undone_leaves_no_trace(mode):
    """Hooks, parametrizations and merged adapters: the same operators run as before."""
    model = backbone(mode)
    expected, operators = outputs_of(model, images()), operators_of(lambda: outputs_of(model, images()))
    handles = [module.register_forward_hook(lambda *_: 1 / 0) for _, module in called_modules(model)]
    with pytest.raises(ZeroDivisionError):
        model(images())
    for handle in handles:
        handle.remove()
    assert_close(outputs_of(model, images()), expected)
    parametrize.register_parametrization(module_of_block(model, f'{LSMM}.tall'), 'weight', Flipped())
    layer = module_of_block(model, 'channel_mixing.fc2')
    adapter = LoRA(layer)
    replace_in_block(model, 'channel_mixing.fc2', adapter)
    changed = outputs_of(model, images())
    assert_changed(changed, expected)
    parametrize.remove_parametrizations(module_of_block(model, f'{LSMM}.tall'), 'weight')
    layer.weight.data.add_(adapter.up.weight @ adapter.down.weight)
    replace_in_block(model, 'channel_mixing.fc2', layer)
    assert_close(outputs_of(model, images()), changed)
    assert operators_of(lambda: outputs_of(model, images())) == operators


# What is done to all of a model.


def weight_norm(layer):
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.mul_(1.3)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nn.utils.weight_norm(layer)
    layer.weight_g.mul_(1.3)


def pruned_for_good(layer):
    prune.remove(prune.l1_unstructured(layer, 'weight', amount=0.3), 'weight')


EVERYWHERE = {
    'weight norm': weight_norm,
    'old weight norm': old_weight_norm,
    'LoRA': LoRA,
    'pruned': pruned('weight'),
    'pruned for good': pruned_for_good,
}


@pytest.mark.parametrize(
    'change, mode', [(change, mode) for change in EVERYWHERE for mode in MODES if (change, mode) != ('pruned', 'train')]
)
def test_all_layers_are_changed(change, mode):
    """All linear layers and convolutions: outputs, gradients and statistics."""
    model = backbone(mode)
    for name, layer in list(model.stages.named_modules()):
        pointwise = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
        if pointwise or (isinstance(layer, nn.Conv2d) and change != 'LoRA'):
            with torch.no_grad():
                new = EVERYWHERE[change](layer)
            model.stages.set_submodule(name, new if isinstance(new, nn.Module) else layer)
    model.train(mode == 'train')
    for gradients in (False, True):  # first without, as weights with a graph cannot be copied
        expected = assert_matches_float64(model, images(), gradients)
    assert_changed(expected, unchanged_outputs(mode))


def with_subclasses(model):
    for module in model.modules():
        subclass_by()(module)
    return model


def checkpointed(model):
    """But for boxes with BN, whose statistics this wrapper would count twice."""
    for name in ('channel_mixing', LSMM, 'strip_mixing.fuse'):
        replace_in_block(model, name, checkpoint_wrapper(module_of_block(model, name)))
    return model


def as_views_of_a_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    return model


def with_other_strides(model):
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim():
            tensor.data = tensor.data.repeat_interleave(2, -1)[..., ::2]
    return model


def by_other_types(model):
    outputs_of(model.double(), images().double(), gradients=False)
    return refilled(model.float())


def refilled(model, **assign):
    mode = 'deploy' if model.deploy else 'train' if model.training else 'eval'
    model.load_state_dict(backbone(mode).state_dict(), **assign)
    return model


def with_a_copied_stage(model):
    model.stages[1] = copy.deepcopy(model.stages[1])
    return model


def deployed(model):
    copied = copy.deepcopy(model)  # which leaves the model alone
    copied.switch_to_deploy()
    assert_close(outputs_of(copied, images()), unchanged_outputs('eval'))
    model.switch_to_deploy()
    return model


HARMLESS = {
    'a deep copy': copy.deepcopy,
    'a pickle': lambda model: mmstrip.accelerate(pickle.loads(pickle.dumps(model))),
    'a copied stage': with_a_copied_stage,
    'subclasses': with_subclasses,
    'DataParallel': lambda model: nn.DataParallel(model).train(model.training),
    'SyncBN': nn.SyncBatchNorm.convert_sync_batchnorm,
    'channels last': lambda model: model.to(memory_format=torch.channels_last),
    'shared between processes': nn.Module.share_memory,
    'other types and back': by_other_types,
    'from meta': lambda model: refilled(model.to('meta').to_empty(device='cpu')),
    'assigned to meta': lambda model: refilled(model.to('meta'), assign=True),
    'views of a vector': as_views_of_a_vector,
    'other strides': with_other_strides,
    'checkpoint wrappers': checkpointed,
}
IN_EVALUATION = {
    'fused': fuse_conv_bn,
    'deployed': deployed,
    'fused, then deployed': lambda model: deployed(fuse_conv_bn(model)),
}


@pytest.mark.parametrize(
    'change, mode',
    [*((change, mode) for mode in MODES for change in HARMLESS), *((change, 'eval') for change in IN_EVALUATION)],
)
def test_what_changes_nothing(change, mode):
    """After a forward: outputs, gradients and statistics."""
    model = backbone(mode)
    outputs_of(model, images())
    got = outputs_of({**HARMLESS, **IN_EVALUATION}[change](refilled(model)), images())
    prefixes = r'module\.|_orig_mod\.|_checkpoint_wrapped_module\.'
    assert_close({re.sub(prefixes, '', name): value for name, value in got.items()}, unchanged_outputs(mode))


@pytest.mark.parametrize('mode', MODES[1:])
@pytest.mark.parametrize('name', ['channel_mixing', LSMM, GRN])
def test_a_module_that_is_compiled_in_place_runs_so(name, mode):
    torch._dynamo.reset()
    graphs = []
    model = SecondStage(mode)
    module_of_block(model, name).compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert_close(outputs_of(model, SecondStage.input()), unchanged_outputs(mode, 'stage'))
    assert graphs


def test_fused_with_a_final_norm():
    """mmcv takes a norm for that of the convolution that precedes it among the children."""
    model = backbone('eval', out_indices=(3,), img_size=64)
    expected = float64_outputs(model, images(2, 3, 64, 64))
    assert_close(outputs_of(fuse_conv_bn(model), images(2, 3, 64, 64)), expected)
    assert not isinstance(module_of_block(model, 'strip_mixing.project.1'), nn.BatchNorm2d)


@pytest.mark.parametrize('norm', ['SyncBN', 'BN'])
def test_batch_norm_of_configs_is_folded(norm):
    """As it is built, and as mmengine's Runner turns it without a process group."""
    for change in (lambda model: model, revert_sync_batchnorm):
        model = change(backbone('eval', norm_cfg=dict(type=norm)))
        expected = float64_outputs(model, images())
        model.switch_to_deploy()
        assert type(module_of_block(model, 'strip_mixing.project.1')) is nn.Identity
        norms = [name for name, module in model.stages.named_modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms and all(name.endswith('strip_mixing.depthwise.0') for name in norms)  # before GELU, it has to stay
        assert not any(isinstance(module, RelativePosition) for module in model.modules())
        assert_close(outputs_of(model, images()), expected)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('change', ['added to', 'cut', 'cut, of another class', 'shortened'])
def test_a_changed_stage_is_followed(change, mode):
    model = backbone(mode)
    stage = model.stages[2]
    if change == 'added to':
        stage.append(nn.Conv2d(64, 64, 1))
    elif change == 'shortened':
        del stage[0]
    else:
        model.stages[2] = stage[1:] if change == 'cut' else nn.Sequential(*stage[1:])
    assert_changed(assert_matches_float64(model, images()), unchanged_outputs(mode))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['fc1', 'fc2.weight', 'lsmm', 'block'])
def test_what_blocks_share_gets_both_gradients(name, mode):
    model = backbone(mode)
    first, second = model.stages[2]
    if name == 'fc1':
        second.channel_mixing.fc1 = first.channel_mixing.fc1
    elif name == 'fc2.weight':
        second.channel_mixing.fc2.weight = first.channel_mixing.fc2.weight
    elif name == 'lsmm':
        second.strip_mixing.branches['lsmm'] = first.strip_mixing.branches['lsmm']
    else:
        model.stages[2][1] = first
    assert_matches_float64(model, images(), gradients=True)
    assert_changed(assert_matches_float64(model, images(), gradients=False), unchanged_outputs(mode))


@pytest.mark.parametrize('name', BATCH_NORMS)
@pytest.mark.parametrize('change', [dict(momentum=0.7), dict(momentum=None), dict(training=False)], ids=str)
def test_a_norm_of_its_own_in_training(change, name):
    """Its outputs, gradients and statistics, over two steps."""
    model = SecondStage('train')
    assign(**change)(module_of_block(model, name))
    reference = float64_copy(model)
    for seed in (0, 1):
        x = SecondStage.input(seed=seed)
        assert_close(outputs_of(model, x), outputs_of(reference, x.double()))
    assert_matches_float64(model.eval(), SecondStage.input())


@pytest.mark.parametrize(
    'frozen', ['weight', 'bias', 'norm', 'depthwise', 'fc', 'position', 'strip_mixing', 'stages.1', '']
)
def test_parts_are_frozen_in_training(frozen):
    model = backbone('train')
    outputs_of(model, images())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    if frozen == 'stages.1':
        model.stages[1].eval()
    assert_matches_float64(model, images())
    assert all((parameter.grad is None) == (frozen in name) for name, parameter in model.named_parameters())
