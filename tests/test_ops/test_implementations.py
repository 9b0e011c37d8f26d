"""Every box that was accelerated against the box in float64: values, gradients, second derivatives."""

import copy

import pytest
import torch
from helpers import HAS_OPERATORS, operators_of, randomise, small_backbone
from torch import nn

import mmstrip
from mmstrip import ops
from mmstrip.models.channel_mixing import ChannelMixingBlock
from mmstrip.models.strip_mixing import (
    CascadeGroupStripMixing,
    LocalStripMixing,
    StripMixingBlock,
    StripMLPLayer,
)
from mmstrip.models.strip_mlp import StripMLPBlock

EXTENT = (6, 5)
CHANNELS = 8
BOXES = {
    'rows': lambda: StripMLPLayer(5, 4, 3, 'row'),
    'columns': lambda: StripMLPLayer(6, 2, 5, 'column'),
    'cgsmm': lambda: CascadeGroupStripMixing(CHANNELS, EXTENT, 4),
    'parallel cgsmm': lambda: CascadeGroupStripMixing(CHANNELS, EXTENT, 1, cascade=False),
    'lsmm': lambda: LocalStripMixing(CHANNELS),
    'strip mixing': lambda: StripMixingBlock(CHANNELS, EXTENT, 2),
    'strip mixing by lsmm': lambda: StripMixingBlock(CHANNELS, EXTENT, 2, branches=('lsmm',)),
    'strip mixing with GN': lambda: StripMixingBlock(CHANNELS, EXTENT, 2, norm_cfg=dict(type='GN', num_groups=2)),
    'channel mixing': lambda: ChannelMixingBlock(CHANNELS),
    'block': lambda: StripMLPBlock(CHANNELS, EXTENT, num_patches=4),
}
OPERATORS = {
    'rows': {'strip_layer'},
    'columns': {'strip_layer'},
    'cgsmm': {'strip_layer', 'pointwise_norm_gelu', 'pointwise'},
    'parallel cgsmm': {'strip_layer', 'pointwise_norm_gelu', 'pointwise'},
    'lsmm': {'local_strips'},
    'strip mixing by lsmm': {'norm_gelu_depthwise', 'pointwise_norm_gelu', 'local_strips', 'pointwise'},
    'channel mixing': {'depthwise', 'channel_mlp'},
}


def accelerated(box: nn.Module) -> nn.Module:
    return mmstrip.accelerate(copy.deepcopy(box))


def map_for(box: nn.Module, seed: int = 0, images: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, CHANNELS, *EXTENT, generator=generator)


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """One that is not linear."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return (out * weights).sum() + out.square().sum()


def gradients(box: nn.Module, x: torch.Tensor, create_graph: bool = False):
    """The output, and the gradients of the input and of all parameters."""
    out = box(x)
    return out, torch.autograd.grad(loss_of(out), [x, *box.parameters()], create_graph=create_graph)


def assert_close(got, expected, tolerance: float = 1e-4):
    """Each within a part of its largest value, or of a thousandth of all: a bias before BN has no gradient."""
    largest = max(b.abs().max().item() for b in expected)
    for a, b in zip(got, expected):
        scale = max(1.0, b.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', BOXES)
def test_values_gradients_and_statistics(name, training):
    box = randomise(BOXES[name]()).train(training)
    fast, exact, x = accelerated(box), box.double(), map_for(box)
    out, found = gradients(fast, x.clone().requires_grad_())
    exact_out, expected = gradients(exact, x.double().requires_grad_())
    assert_close((out, *found, *fast.buffers()), (exact_out, *expected, *exact.buffers()))
    with torch.no_grad():
        assert_close([fast.eval()(x)], [exact.eval()(x.double())])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', BOXES)
def test_second_derivatives(name, training):
    """A Hessian times a vector, in both ways to ask for it; then with all but one tensor frozen."""
    box = randomise(BOXES[name]()).train(training)
    results, kept = [], next(iter(dict(box.named_parameters())))
    for module in (accelerated(box), box.double()):
        x = map_for(module).to(next(module.parameters()).dtype).requires_grad_()
        inputs = [x, *module.parameters()]
        _, first = gradients(module, x, create_graph=True)
        directions = [torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v.dtype) for v in inputs]
        product = sum((gradient * direction).sum() for gradient, direction in zip(first, directions))
        by_grad = torch.autograd.grad(product, inputs, retain_graph=True, materialize_grads=True)
        loss_of(module(x)).backward(create_graph=True, inputs=inputs)
        penalty = sum(value.grad.square().sum() for value in inputs)
        for value in inputs:
            value.grad = None
        penalty.backward(inputs=inputs)
        results.append([*by_grad, *(torch.zeros_like(v) if v.grad is None else v.grad for v in inputs)])
        alone = module.requires_grad_(False).get_parameter(kept).requires_grad_()
        (first,) = torch.autograd.grad(loss_of(module(x.detach())), alone, create_graph=True)
        results[-1] += [first, *torch.autograd.grad(first.square().sum(), alone)]
    assert_close(*results, tolerance=1e-3)


@pytest.mark.parametrize('name', ['cgsmm', 'lsmm', 'channel mixing', 'strip mixing'])
def test_gradients_that_are_batched(name):
    """vmap over backward passes, as torch.autograd.functional does with vectorize=True; in windows."""
    box = accelerated(randomise(BOXES[name]()).eval())
    x = torch.randn(2, CHANNELS, 9, 11, requires_grad=True)
    out = box(x)
    batch = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, x, batch, is_grads_batched=True, retain_graph=True)
    backward = lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0]  # noqa: E731
    one_by_one = torch.stack([backward(grad) for grad in batch])
    assert_close([batched, torch.func.vmap(backward)(batch)], [one_by_one, one_by_one])


@pytest.mark.skipif(not HAS_OPERATORS, reason=ops.status())
@pytest.mark.parametrize('name', OPERATORS)
def test_operators_stand_in(name):
    """A box that was accelerated runs on the operators that were written for it, and on nothing else of ours."""
    box = accelerated(randomise(BOXES[name]()).eval())
    with torch.no_grad():
        assert operators_of(lambda: box(map_for(box))) == OPERATORS[name]


def test_drop_path_draws_the_same_numbers():
    """A training step that is repeated after the call drops the same branches."""
    model = randomise(small_backbone(drop_path_rate=0.5))
    x = torch.rand(4, 3, 64, 64)
    results = []
    for one in (accelerated(model), model):
        torch.manual_seed(3)
        results.append(one(x)[0])
    assert_close(results[:1], results[1:], tolerance=1e-3)
