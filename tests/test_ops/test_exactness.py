"""Where an implementation could differ from the modules: patches, dead channels, mixed precisions, odd states."""

import copy

import pytest
import torch
from helpers import HAS_OPERATORS, accelerator, operators_of, randomise, small_backbone
from mmcv.cnn.bricks import DropPath
from torch import nn

import mmstrip
from mmstrip import ops
from mmstrip.models.channel_mixing import ChannelMixingBlock
from mmstrip.models.strip_mixing import StripMixingBlock
from mmstrip.models.strip_mlp import StripMLPBlock

X = torch.rand(2, 3, 64, 64)


def as_reference(model, x=X):
    with torch.no_grad():
        return mmstrip.restore(copy.deepcopy(model))(x)[0]


def accelerated(**arguments):
    """A small backbone in evaluation mode."""
    return mmstrip.accelerate(randomise(small_backbone(**arguments)).eval())


@pytest.mark.skipif(not HAS_OPERATORS, reason=ops.status())
@pytest.mark.parametrize(
    'kind, name',
    [
        *((kind, 'forward') for kind in (nn.Linear, nn.GELU, nn.modules.batchnorm._BatchNorm, StripMLPBlock)),
        (nn.Conv2d, '_conv_forward'),
        (nn.Linear, '__call__'),
    ],
)
@pytest.mark.parametrize('form', ['trained', 'deploy'])
def test_patched_classes_act_once_the_model_is_accelerated_again(kind, name, form, monkeypatch):
    """Nobody looks for them in each forward."""
    model = accelerated(deploy=form == 'deploy')
    original = getattr(kind, name)
    with torch.no_grad():
        before = model(X)[0]
        monkeypatch.setattr(kind, name, lambda *arguments: 0.5 * original(*arguments))
        assert f'{name} is patched, by test_exactness' in accelerator.change_classes(model)
        assert not operators_of(lambda: model(X))
        assert not torch.allclose(model(X)[0], before)
        monkeypatch.undo()
        assert '5 of 5 blocks' in accelerator.change_classes(model)
        assert torch.equal(model(X)[0], before)


@pytest.mark.parametrize('deploy', [False, True])
def test_drop_path_follows_its_own_mode(deploy):
    """As Monte Carlo dropout sets it."""
    model = accelerated(drop_path_rate=0.5, deploy=deploy)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.train()
    with torch.no_grad():
        assert not torch.equal(model(X)[0], model(X)[0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_dead_channels_have_finite_gradients(dtype):
    """GRN's norm of a channel that is 0 on the whole map has no slope, on operators and on the reference."""
    box = randomise(ChannelMixingBlock(8))
    box.fc1.weight.data[0] = box.fc1.bias.data[0] = 0
    x, found = torch.randn(2, 8, 4, 4), []
    for prepare in (mmstrip.restore, mmstrip.accelerate):
        module = prepare(copy.deepcopy(box).to(dtype))
        (1e3 * module(x.to(dtype)).float().sum()).backward()
        found.append(module.fc1.weight.grad.float())
        assert torch.isfinite(found[-1]).all()
    torch.testing.assert_close(*found, rtol=0, atol=0.05 * found[0].abs().max().item())


def test_a_branch_may_give_another_dtype():
    class Half(nn.Module):
        def __init__(self, branch):
            super().__init__()
            self.branch = branch

        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16):
                return self.branch(x).bfloat16()

    model = accelerated()
    mixing = model.stages[0][0].strip_mixing
    mixing.branches['lsmm'] = Half(mixing.branches['lsmm'])
    with torch.no_grad():
        torch.testing.assert_close(model(X)[0], as_reference(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    'changes',
    [
        dict(stride=(2, 2)),
        dict(dilation=(2, 2)),
        dict(kernel_size=(5, 5), weight=nn.Parameter(torch.rand(8, 1, 5, 5))),
    ],
)
def test_a_convolution_that_gives_maps_of_another_size(changes):
    box, x = mmstrip.accelerate(ChannelMixingBlock(8)), torch.randn(2, 8, 9, 9)
    for name, value in changes.items():
        setattr(box.depthwise, name, value)
    found = box(x)
    torch.testing.assert_close(found, mmstrip.restore(box)(x))


def test_sparse_parameters():
    box, x = mmstrip.accelerate(ChannelMixingBlock(8, 3)), torch.randn(2, 8, 4, 4)
    box.fc1.weight = nn.Parameter(torch.rand(24, 8).to_sparse_csr(), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(box(x), mmstrip.restore(box)(x))


def test_branches_whose_parts_are_uneven():
    box = StripMixingBlock(16, (4, 4), 2)
    box.branches = nn.ModuleDict({name: nn.Identity() for name in 'abc'})
    for training in (True, False):
        x = torch.randn(2, 16, 4, 4)
        found = mmstrip.accelerate(box.train(training))(x)
        torch.testing.assert_close(found, mmstrip.restore(box)(x), rtol=1e-4, atol=1e-5)


def test_drop_path_of_a_branch_for_all_images():
    """As many numbers are drawn as the branch has images."""
    block = StripMLPBlock(8, (4, 4), drop_path=0.5, num_patches=2)
    x, branch = torch.randn(4, 8, 4, 4), torch.randn(1, 8, 4, 4)
    block.strip_mixing.forward = block.channel_mixing.forward = lambda x: branch
    results = []
    for prepare in (mmstrip.accelerate, mmstrip.restore):
        torch.manual_seed(0)
        results.append(prepare(block)(x))
    torch.testing.assert_close(*results)


def test_overflow_is_not_hidden():
    """Squares beyond float32 make LayerNorm NaN, with gradients and without."""
    box, x = mmstrip.accelerate(ChannelMixingBlock(80)), 1e20 * torch.randn(1, 80, 4, 4)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert box(x).isnan().all()


def test_a_stage_packed_under_autocast_is_not_run_outside():
    stage = accelerated(deploy=True).stages[0]
    x = torch.rand(1, 16, 16, 16)
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            stage(x.bfloat16())
        with pytest.raises(RuntimeError):
            stage(x.bfloat16())


def test_backward_under_autocast():
    """A backward pass that is run within autocast, of a forward pass outside of it."""
    model = accelerated(drop_path_rate=0.0).train()
    results = []
    for inside in (False, True):
        network = copy.deepcopy(model)
        out = network(X)[0]
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        with torch.autocast('cpu', torch.bfloat16, enabled=inside):
            loss.backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert torch.nn.functional.cosine_similarity(*results, dim=0) > 0.99


def test_statistics_stay_infinite():
    """As PyTorch's do, not NaN."""
    box = mmstrip.accelerate(StripMixingBlock(8, (4, 4), 2))
    box.project[1].running_mean.fill_(float('inf'))
    box.depthwise[0].momentum = 1.0
    box(torch.randn(2, 8, 4, 4))
    assert torch.isinf(box.project[1].running_mean).all()
    assert box.depthwise[0].running_var.max() < 2


@pytest.mark.skipif(not HAS_OPERATORS, reason=ops.status())
def test_blocks_of_several_extents_are_not_packed():
    model, other = (accelerated(img_size=side, deploy=True, out_indices=0) for side in (64, 32))
    model.stages[0].append(other.stages[0][0])
    with torch.no_grad():
        torch.testing.assert_close(model(X)[0], as_reference(model), rtol=1e-4, atol=1e-4)
        assert 'strip_layer' in operators_of(lambda: model(X))
