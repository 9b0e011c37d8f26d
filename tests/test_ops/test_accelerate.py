"""mmstrip.accelerate: what it changes, what it says, and that a model stays what it was around it."""

import copy
import importlib.util
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from helpers import HAS_OPERATORS, accelerator, operators_of, python, randomise, small_backbone
from mmcv.cnn import fuse_conv_bn
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

import mmstrip
from mmstrip import ops
from mmstrip.models import StripMLP
from mmstrip.ops import context
from mmstrip.ops.fast import Fast

needs_operators = pytest.mark.skipif(not HAS_OPERATORS, reason=ops.status())
X = torch.rand(2, 3, 64, 64)
EVERYTHING = {
    *('channel_mlp', 'depthwise', 'local_strips', 'norm_gelu_depthwise'),
    *('pointwise', 'pointwise_norm_gelu', 'strip_layer'),
}


def plain(**arguments) -> StripMLP:
    return randomise(small_backbone(**arguments)).eval()


@pytest.fixture
def model():
    return mmstrip.accelerate(plain())


def assert_as_restored(model, x=X):
    """An accelerated model gives what a copy on the reference gives."""
    with torch.no_grad():
        expected = mmstrip.restore(copy.deepcopy(model))(x)
        for got, right in zip(model(x), expected):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def operators(model, x=X):
    with torch.no_grad():
        return operators_of(lambda: model(x))


@needs_operators
class TestTheCall:
    def test_a_model_that_is_built_runs_the_reference(self):
        model = plain()
        assert not operators(model)
        assert operators(mmstrip.accelerate(model)) == EVERYTHING
        assert not operators(mmstrip.restore(model))

    def test_nothing_but_classes_changes(self):
        model = plain()
        state, before = model.state_dict(), {module: dict(vars(module)) for module in model.modules()}
        assert mmstrip.accelerate(model) is model
        assert model.state_dict().keys() == state.keys()
        assert all(vars(module) == attributes for module, attributes in before.items())
        kinds = Counter(type(module).__name__ for module in model.modules() if isinstance(module, Fast))
        assert kinds == dict(
            FastStage=4,
            FastStripMLPBlock=5,
            FastStripMixingBlock=5,
            FastCascadeGroupStripMixing=5,
            FastLocalStripMixing=5,
            FastChannelMixingBlock=5,
            FastStripMLPLayer=10,
        )
        mmstrip.restore(mmstrip.restore(model))
        assert not any(isinstance(module, Fast) for module in model.modules())

    def test_every_strip_mlp_in_any_model(self):
        model = nn.ModuleDict(dict(teacher=nn.Sequential(plain()), student=nn.DataParallel(plain())))
        assert '10 of 10 blocks' in accelerator.change_classes(model)
        assert operators(model['teacher']) == EVERYTHING

    def test_it_says_what_runs(self, model):
        types = 'float32 and bfloat16' if ops.takes(torch.bfloat16) else 'float32'
        instructions = accelerator.INSTRUCTIONS[accelerator.extension.variant()]
        assert accelerator.change_classes(model) == f'5 of 5 blocks on native operators, {instructions}{types}'
        assert accelerator.change_classes(nn.Linear(2, 2)) == 'there is none in this Linear'

    @pytest.mark.parametrize(
        'change, where',
        [
            (lambda block: setattr(block.channel_mixing, 'fc1', nn.Sequential(nn.Linear(2, 3))), 'fc1 (Sequential)'),
            (lambda block: block.strip_mixing.fuse.register_forward_hook(print), 'strip_mixing.fuse (Conv2d)'),
            (lambda block: nn.utils.parametrizations.weight_norm(block.channel_mixing.fc2), 'fc2 (ParametrizedLinear)'),
            (lambda block: setattr(block, 'drop_path', nn.Identity()), 'drop_path (Identity)'),
            (lambda block: block.channel_mixing.double(), 'channel_mixing.depthwise (Conv2d)'),
        ],
    )
    def test_it_says_where_the_reference_runs(self, change, where):
        model = plain()
        change(model.stages[2][1])
        said = accelerator.change_classes(model)
        assert said.startswith('4 of 5 blocks') and 'the reference elsewhere: stages.2.1' in said
        assert f'{where} is replaced, wrapped, parametrized, hooked or of another type' in said

    def test_on_other_devices_the_reference_runs(self, model):
        said = accelerator.change_classes(model.to('meta'))
        assert said == 'the reference runs, as the native operators are for CPUs, and the model is on meta'
        assert not any(isinstance(module, Fast) for module in model.modules())

    def test_the_old_call_names_the_new_one(self):
        with pytest.raises(RuntimeError, match=r'ops.use is gone: .* mmstrip.accelerate\(model\) makes one faster'):
            ops.use('reference')

    def test_what_restore_does_not_know_is_refused_by_name(self, model):
        block = model.stages[2][0]
        block.__class__ = type('Wrapped', (type(block),), {})
        with pytest.raises(TypeError, match='stages.2.0 is a Wrapped'):
            mmstrip.restore(model)
        assert isinstance(model.stages[0], Fast)

    def test_few_calls_of_python(self):
        """A tenth of what a search for patched classes in every forward took: 4,645 calls of ours in a forward."""
        model, calls = mmstrip.accelerate(plain(out_indices=(0, 1, 2, 3))), Counter()

        def count(frame, event, argument):
            calls[event] += event == 'call' and 'mmstrip' in frame.f_code.co_filename

        with torch.no_grad():
            model(X[:1])
            sys.setprofile(count)
            try:
                model(X[:1])
            finally:
                sys.setprofile(None)
        assert calls['call'] < 464


def fast_boxes(model):
    return [type(module) for module in model.modules() if isinstance(module, Fast)]


@needs_operators
class TestAroundIt:
    """What else is done to a model, before the call and after it."""

    def test_deep_copies_stay_fast_and_pickles_are_of_the_reference(self, model):
        model.stages[0][0].channel_mixing.compile()
        copied = copy.deepcopy(model)
        assert fast_boxes(copied) == fast_boxes(model)
        assert copied.stages[0][0].channel_mixing._compiled_call_impl is None
        assert operators(copied) == EVERYTHING
        pickled = pickle.dumps(model)
        assert b'mmstrip.ops' not in pickled
        loaded = pickle.loads(pickled)
        assert not fast_boxes(loaded) and loaded.state_dict().keys() == model.state_dict().keys()
        assert_as_restored(mmstrip.accelerate(loaded))

    def test_the_call_packs_weights_again(self, model):
        """As after pruning through .data, which a forward may not notice."""
        model.switch_to_deploy()
        with torch.no_grad():
            model(X)
        weight = model.stages[0][0].channel_mixing.fc1.weight.data.flatten()
        weight[1 : (len(weight) - 1) // 8] = 0  # between two of the nine values that are compared
        assert_as_restored(mmstrip.accelerate(model))

    @pytest.mark.parametrize('first', ['accelerate', 'wrap'])
    def test_distributed(self, first, one_process):
        model = plain(drop_path_rate=0.0)
        expected = gradients(copy.deepcopy(model))
        if first == 'accelerate':
            mmstrip.accelerate(model)
        model = DistributedDataParallel(model)
        mmstrip.accelerate(model)
        assert len(fast_boxes(model)) == 39
        assert operators(model) == EVERYTHING
        torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-3)

    def test_fully_sharded_after_the_call(self, one_process):
        model = plain(drop_path_rate=0.0)
        expected = gradients(copy.deepcopy(model))
        mmstrip.accelerate(model)
        mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))
        for stage in model.stages:
            for block in stage:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert 'channel_mlp' in operators(model)  # its parameters are plain ones while a block runs
        torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-3)
        with pytest.raises(TypeError, match='stages.0.0 is a FSDPFastStripMLPBlock, which something else has made'):
            mmstrip.restore(model)

    def test_fully_sharded_before_the_call(self, one_process):
        model = plain()
        for stage in model.stages:
            fully_shard(stage, mesh=torch.distributed.device_mesh.init_device_mesh('cpu', (1,)))
        with torch.no_grad():
            expected = model(X)[0]
            mmstrip.accelerate(model)
            torch.testing.assert_close(model(X)[0], expected, rtol=1e-4, atol=1e-4)

    def test_layers_converted_and_fused(self, model):
        """BN that is SyncBN runs the reference; folded into a convolution, operators again."""
        everything = operators(model)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert operators(model) == {'depthwise', 'channel_mlp', 'local_strips', 'strip_layer'}
        assert_as_restored(model)
        model = fuse_conv_bn(mmstrip.accelerate(plain()))
        assert operators(model) == everything
        assert_as_restored(model)

    def test_statistics_estimated_anew(self):
        model = mmstrip.accelerate(plain(drop_path_rate=0.0))
        reference = mmstrip.restore(copy.deepcopy(model))
        for one in (model, reference):
            update_bn([X, 2 * X], one.train())
        for one, other in zip(model.buffers(), reference.buffers()):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert operators(model.eval()) == EVERYTHING
        assert_as_restored(model)

    @pytest.mark.parametrize('first', [True, False])
    @pytest.mark.parametrize('name', ['stages.0.0', 'stages.2.1.channel_mixing.fc1'])
    def test_activation_checkpointing_of_mmengine(self, name, first):
        """It assigns another forward to a module."""
        model = plain(drop_path_rate=0.0).train()
        expected = gradients(copy.deepcopy(model))
        if first:
            mmstrip.accelerate(model)
        turn_on_activation_checkpointing(model, [name])
        mmstrip.accelerate(model)
        assert 'forward' in vars(model.get_submodule(name))
        torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-3)

    def test_efficient_evaluation_of_convolutions(self, model):
        """It assigns another forward to convolutions and norms as well."""
        names = [f'stages.{name}.strip_mixing.project' for name in ('0.0', '1.0', '2.0', '2.1', '3.0')]
        turn_on_efficient_conv_bn_eval(model, names)
        assert operators(model) == EVERYTHING - {'norm_gelu_depthwise'}
        assert_as_restored(model)

    def test_other_types(self, model):
        stage, x = model.stages[0], torch.rand(1, 16, 16, 16)
        assert not operators(stage.double(), x.double())
        assert not operators(stage.half(), x.half())
        assert operators(stage.float(), x) == EVERYTHING
        with torch.autocast('cpu', torch.float16):
            assert not operators(stage, x)

    def test_attributes_that_cannot_be_compared(self, model):
        class Stubborn:
            def __eq__(self, other):
                raise TypeError

        for note in (Stubborn, lambda: numpy.zeros(3), lambda: torch.ones(3), lambda: [numpy.ones(2)]):
            for _ in range(2):
                model.stages[0][0].channel_mixing.fc1.note = model.stages[0][0].note = note()
                assert operators(model) == EVERYTHING

    @pytest.mark.parametrize('deploy', [False, True])
    def test_features_are_not_overwritten(self, deploy):
        """By the next forward; nor are the images."""
        model, x = mmstrip.accelerate(plain(deploy=deploy, out_indices=(0, 1, 2, 3))), X.clone()
        with torch.no_grad():
            features = model(x)
            saved = [feature.clone() for feature in features]
            model(torch.rand_like(x))
        assert torch.equal(x, X) and all(map(torch.equal, features, saved))


def gradients(model) -> torch.Tensor:
    """Of the parameters, in training mode, one after the other."""
    model.train()
    model.zero_grad()
    out = model(X)[0]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = (p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad for p in model.parameters())
    return torch.cat([gradient.flatten() for gradient in grads])


def test_a_machine_without_a_compiler_says_so():
    code = (
        'import torch, mmstrip; from mmstrip import ops; from mmstrip.models import StripMLP\n'
        "model = mmstrip.accelerate(StripMLP('tiny-light', img_size=32))\n"
        'print(ops.status(), {type(module).__module__ for module in model.stages.modules()})\n'
    )
    done = python(code, env={'MMSTRIP_NATIVE': '0'})
    why = 'MMSTRIP_NATIVE=0 switches the compiled operators off'
    assert f'the reference runs, as there are no native operators: {why}\n' in done.stdout, done.stdout
    assert f'no compiled operators, the network is slower on CPUs: {why}; GPUs run compiled graphs ' in done.stdout
    assert 'mmstrip.models.strip_mlp' in done.stdout and 'mmstrip.ops' not in done.stdout


PRIVATE = [
    *('_C._is_tracing', '_C._len_torch_dispatch_stack', '_C._len_torch_function_stack', '_C._dispatch_keys'),
    *('_C._functorch.peek_interpreter_stack', '_C._get_mkldnn_enabled', '_C._dispatch_key_parse'),
    'autograd.forward_ad._current_level',
    *(f'nn.modules.module._global_{name}_hooks' for name in ('forward', 'forward_pre', 'backward', 'backward_pre')),
]


class TestPrivateNamesOfPyTorch:
    """A PyTorch without one of them loses speed, not the forward."""

    @pytest.mark.parametrize('name', PRIVATE)
    def test_one_is_missing(self, name, monkeypatch):
        model, parent = plain(), torch
        *path, last = name.split('.')
        for part in path:
            parent = getattr(parent, part)
        with monkeypatch.context() as patch:
            patch.delattr(parent, last)
            spec = importlib.util.spec_from_file_location('mmstrip.ops.another_context', context.__file__)
            another = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(another)
        assert [f'torch.{name}'] == another.UNKNOWN
        monkeypatch.setattr(accelerator, 'UNKNOWN', another.UNKNOWN)
        assert accelerator.change_classes(model) == (
            f'the reference runs, as this PyTorch, {torch.__version__}, has no torch.{name}'
        )
        assert not operators(model)
        assert accelerator.status().count(f'this PyTorch, {torch.__version__}, has no torch.{name}') == 2

    def test_these_are_all(self):
        text = Path(context.__file__).read_text()
        assert text.count('_private(') == len(PRIVATE) - 3 + 1  # four in one call; the definition
