"""Formulas for graphs on GPUs against the modules of the paper, on CPUs, where ATen computes their operators."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmstrip.models.strip_mlp import StripMLP, StripMLPBlock
from mmstrip.ops import gpu

pytestmark = pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))
EXAMPLES = settings(max_examples=15, deadline=None)
SIDES = st.integers(1, 7)


def build(channels=8, extent=(4, 5), patches=2, dtype=torch.float64, **settings) -> StripMLPBlock:
    """A block whose parameters are all drawn, also those that start at 0."""
    block = StripMLPBlock(channels, extent, num_patches=patches, **settings).to(dtype)
    for parameter in block.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return block


def run(function, block, x, autocast=False):
    """Result, gradients and buffers."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = function(block, x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    named = {name: parameter.grad for name, parameter in block.named_parameters()}
    return dict(y=y.detach(), x=x.grad, **named, **dict(block.named_buffers()))


def check(block, x, tolerance=1e-9, autocast=False, forward=gpu.block_forward, exact=None):
    ours = run(forward, copy.deepcopy(block), x, autocast)
    right = run(StripMLPBlock.forward, *copy.deepcopy(exact or (block, x)))
    assert ours['y'].dtype == (torch.bfloat16 if autocast and x.dtype == torch.bfloat16 else x.dtype)
    assert ours.keys() == right.keys()
    for name, value in right.items():
        assert ours[name].shape == value.shape, name
        scale = value.double().norm() + (1 if 'project.0.bias' in name else 1e-6)  # that gradient is rounding alone
        error = ((ours[name].double() - value.double()).norm() / scale).item()
        assert error < tolerance, f'{name} misses by {error:.1e}'


@EXAMPLES
@given(
    st.integers(1, 3), st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.integers(1, 3),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 3, 5]),
)  # fmt: skip
def test_block(patches, extent, size, images, fits, cascade, training, strip_width):
    size = extent if fits else size
    if images * size[0] * size[1] == 1:
        images = 2
    block = build(4 * patches, extent, patches, cascade=cascade, strip_width=strip_width).train(training)
    check(block, torch.randn(images, 4 * patches, *size, dtype=torch.float64))


@pytest.mark.parametrize('branches', [('cgsmm',), ('lsmm',), ('cgsmm', 'lsmm')])
def test_block_of_other_branches(branches):
    check(build(branches=branches), torch.randn(2, 8, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize('channels_last', [False, True])
def test_block_in_bfloat16(channels_last):
    """Under autocast, as close to float64 as rounding of maps lets it be."""
    block = build(16, (7, 7), dtype=torch.float32)
    x = torch.randn(4, 16, 7, 7)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    exact = copy.deepcopy(block).double(), x.double()
    check(block, x.bfloat16(), 5e-2, autocast=True, exact=exact)
    check(block, x, 5e-2, autocast=True, exact=exact)


def test_block_is_one_graph():
    """And so is its backward pass; running statistics move once."""
    compiled = torch.compile(gpu.block_forward, fullgraph=True, backend='aot_eager', dynamic=False)
    check(build(dtype=torch.float32), torch.randn(2, 8, 4, 5), 1e-4, forward=compiled)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replace(path):
    def change(block):
        layer = block.get_submodule(path)
        layer.__class__ = Doubled

    return change


def hook(path):
    return lambda block: block.get_submodule(path).register_forward_hook(lambda module, inputs, y: 2 * y)


def forward(path):
    def change(block):
        layer = block.get_submodule(path)
        layer.forward = lambda x: 2 * type(layer).forward(layer, x)

    return change


@pytest.mark.parametrize(
    'change',
    [
        replace('strip_mixing.fuse'), replace('strip_mixing.branches.lsmm.tall'), replace('channel_mixing.depthwise'),
        hook('strip_mixing.project.0'), hook('strip_mixing.branches.cgsmm'), hook('channel_mixing.act'),
        hook('strip_mixing'), forward('strip_mixing.branches.cgsmm.fuse_row'), forward('channel_mixing.fc1'),
    ],
)  # fmt: skip
def test_changed_layers_are_honoured(change):
    block = build()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    before = gpu.block_forward(copy.deepcopy(block), x)
    change(block)
    y = gpu.block_forward(block, x)
    torch.testing.assert_close(y, StripMLPBlock.forward(block, x))
    assert not torch.allclose(y, before)


def test_padding_takes_the_reference():
    block, x = build(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    valid = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    valid[..., 3:] = False
    y = gpu.block_forward(block, x, valid=valid)
    torch.testing.assert_close(y, StripMLPBlock.forward(block, x, valid=valid))


def test_drop_path_drops_images():
    """Of each branch, at its rate, and scales those that are kept."""
    block = build(drop_path=0.25, dtype=torch.float32)
    nn.init.zeros_(block.channel_mixing.fc2.weight)
    nn.init.ones_(block.channel_mixing.fc2.bias)
    nn.init.zeros_(block.strip_mixing.fuse.weight)
    x = torch.randn(4000, 8, 1, 2)
    added = (gpu.block_forward(block, x) - x)[:, 0, 0, 0]
    kept = added > 0.5
    assert 0.72 < kept.float().mean() < 0.78
    torch.testing.assert_close(added, kept / 0.75, rtol=1e-4, atol=1e-4)
    assert gpu.block_forward(block.eval(), x[:5]).sub(x[:5]).sub(1).abs().max() < 1e-5


@EXAMPLES
@given(st.integers(4, 9), st.integers(4, 9), st.integers(1, 3))
def test_merging(height, width, images):
    """Products and multiplications instead of convolutions, sizes floored as theirs are."""
    merging = nn.Conv2d(3, 6, 2, 2, bias=False).double()
    cross_stage = nn.ModuleList(nn.Conv2d(3, 6, 2, 2, groups=3, bias=False) for _ in range(2)).double()
    maps = [torch.randn(images, 3, height, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    outcomes = []
    for function in (gpu.merge_maps, convolve):
        merging.zero_grad(), cross_stage.zero_grad()
        y, earlier = function(merging, cross_stage, maps[0], maps[1:])
        leaves = [*maps, *merging.parameters(), *cross_stage.parameters()]
        grads = torch.autograd.grad(sum((m * m).sum() for m in (y, *earlier)), leaves)
        outcomes.append([y, *earlier, *grads])
    for ours, right in zip(*outcomes):
        torch.testing.assert_close(ours, right)


def convolve(merging, cross_stage, x, earlier):
    earlier = [conv(feature) for conv, feature in zip(cross_stage, earlier)]
    merged = merging(x)
    return sum(earlier, merged), [*earlier, merged]


def test_images_are_merged():
    conv = StripMLP(dict(embed_dims=8, depths=(1, 1, 1, 1)), out_indices=(0,)).patch_embed
    images = torch.randn(2, 3, 33, 38)
    y, _ = gpu.merge_maps(conv, nn.ModuleList(), images, [])
    torch.testing.assert_close(y, conv(images), rtol=1e-4, atol=1e-5)


def test_changed_merging_is_honoured():
    conv = Doubled(3, 6, 2, 2, groups=3, bias=False)
    maps = [torch.randn(1, 3, 4, 4) for _ in range(2)]
    merging = nn.Conv2d(3, 6, 3, 2, padding=1)
    ours, right = (function(merging, [conv], maps[0], maps[1:]) for function in (gpu.merge_maps, convolve))
    torch.testing.assert_close(ours, right)


def test_graphs_guard_layers():
    """A layer that is replaced after a graph was made for it is called."""
    merging, conv = nn.Conv2d(3, 6, 2, 2, bias=False), nn.Conv2d(3, 6, 2, 2, groups=3, bias=False)
    x, feature = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    compiled = torch.compile(gpu.merge_maps, backend='eager')
    for kind in (nn.Conv2d, Doubled):
        conv.__class__ = kind
        y, _ = compiled(merging, [conv], x, [feature])
        torch.testing.assert_close(y, merging(x) + conv(feature))
