"""Every implementation of every box against the box in float64: values, gradients, second derivatives."""

import copy

import pytest
import torch
from helpers import HAS_OPERATORS, IMPLEMENTATIONS, operators_of, randomise, run_by, small_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def map_for(box: nn.Module, seed: int = 0, images: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, CHANNELS, *EXTENT, generator=generator)


def gradients(box: nn.Module, x: torch.Tensor, create_graph: bool = False):
    """The output, and the gradients of the input and of all parameters of a loss that is not linear in it."""
    inputs = [x, *box.parameters()]
    out = box(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum() + out.square().sum(), inputs, create_graph=create_graph)


def assert_close(got, expected, tolerance: float = 1e-4):
    """Each within a part of its largest value, or of a thousandth of all: a bias before BN has no gradient."""
    largest = max(b.abs().max().item() for b in expected)
    for a, b in zip(got, expected):
        scale = max(1.0, b.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', BOXES)
def test_values_and_gradients(implementation, name, training):
    box = randomise(BOXES[name]()).train(training)
    exact = copy.deepcopy(box).double()
    x = map_for(box)
    run_by(implementation, box)
    out, found = gradients(box, x.clone().requires_grad_())
    exact_out, expected = gradients(exact, x.double().requires_grad_())
    assert_close((out, *found, *box.buffers()), (exact_out, *expected, *exact.buffers()))
    with torch.no_grad():
        assert_close([box.eval()(x)], [exact.eval()(x.double())])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', BOXES)
def test_second_derivatives(implementation, name, training):
    """A Hessian times a vector, in both ways to ask for it."""
    results = []
    box = randomise(BOXES[name]()).train(training)
    for module in (run_by(implementation, copy.deepcopy(box)), box.double()):
        x = map_for(module).to(next(module.parameters()).dtype).requires_grad_()
        inputs = [x, *module.parameters()]
        _, first = gradients(module, x, create_graph=True)
        directions = [torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v.dtype) for v in inputs]
        product = sum((gradient * direction).sum() for gradient, direction in zip(first, directions))
        by_grad = torch.autograd.grad(product, inputs, retain_graph=True, materialize_grads=True)
        module.zero_grad()
        module(x).square().sum().backward(create_graph=True, inputs=inputs)
        penalty = sum(value.grad.square().sum() for value in inputs)
        for value in inputs:
            value.grad = None
        penalty.backward(inputs=inputs)
        results.append([*by_grad, *(torch.zeros_like(v) if v.grad is None else v.grad for v in inputs)])
    assert_close(*results, tolerance=1e-3)


@pytest.mark.parametrize('name', ['cgsmm', 'lsmm', 'channel mixing', 'strip mixing'])
def test_gradients_that_are_batched(implementation, name):
    """vmap over backward passes, as torch.autograd.functional does with vectorize=True."""
    box = run_by(implementation, randomise(BOXES[name]()).eval())
    x = map_for(box).requires_grad_()
    out = box(x)
    batch = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, x, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in batch]
    assert_close([batched], [torch.stack(one_by_one)])


@pytest.mark.parametrize('name', BOXES)
def test_gradients_that_are_not_required(implementation, name):
    """Freeze all but one of the parameters, or the input: the rest is what it was."""
    box = run_by(implementation, randomise(BOXES[name]()))
    x = map_for(box)
    _, expected = gradients(box, x.requires_grad_())
    for kept in range(len(expected)):
        alone = copy.deepcopy(box).requires_grad_(False)
        inputs = [x.detach().clone(), *alone.parameters()]
        inputs[kept].requires_grad_()
        out = alone(inputs[0])
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        ((out * weights).sum() + out.square().sum()).backward()
        assert_close([inputs[kept].grad], [expected[kept]])
        assert all(value.grad is None for i, value in enumerate(inputs) if i != kept)


@pytest.mark.skipif(not HAS_OPERATORS, reason=ops.status())
@pytest.mark.parametrize('name', OPERATORS)
def test_operators_stand_in(name):
    """An accelerated box runs on the operators that were written for it, and on nothing else of ours."""
    box = randomise(BOXES[name]()).eval()
    for implementation in IMPLEMENTATIONS:
        run_by(implementation, box)
        operators = OPERATORS[name] if implementation == 'native' else set()
        with torch.no_grad():
            assert operators_of(lambda: box(map_for(box))) == operators


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(1, 12)),
    channels=st.sampled_from([2, 6, 20, 34]),
    name=st.sampled_from(['lsmm', 'channel mixing', 'cgsmm']),
)
@settings(max_examples=40)
def test_any_map(size, channels, name):
    """Sizes that are windows, in windows and padded; channels that fill vectors and that do not."""
    images, height, width = size
    box = dict(
        lsmm=lambda: LocalStripMixing(channels),
        cgsmm=lambda: CascadeGroupStripMixing(channels, EXTENT, 2),
    ).get(name, lambda: ChannelMixingBlock(channels))()
    box = randomise(box).eval()
    x = torch.randn(images, channels, height, width)
    expected = gradients(copy.deepcopy(box).double(), x.double().requires_grad_())
    for implementation in IMPLEMENTATIONS:
        out, found = gradients(run_by(implementation, box), x.clone().requires_grad_())
        assert_close((out, *found), (expected[0], *expected[1]), tolerance=1e-3)


@pytest.mark.parametrize('arguments', [{}, dict(cascade=False), dict(norm_cfg=dict(type='GN', num_groups=2))])
@pytest.mark.parametrize('size', [(64, 64), (97, 75)])
def test_whole_network(implementation, arguments, size):
    """A training step and inference, on maps that are windows, in windows and padded."""
    x = torch.rand(2, 3, *size)
    results = []
    model = randomise(small_backbone(out_indices=(0, 1, 2, 3), drop_path_rate=0.0, **arguments))
    for network in (run_by(implementation, copy.deepcopy(model)), model.double()):
        features = network(x.to(next(network.parameters()).dtype))
        sum(feature.square().mean() for feature in features).backward()
        found = [parameter.grad for parameter in network.parameters()]
        with torch.no_grad():
            results.append((*features, *found, *network.eval()(x.to(features[0].dtype))))
    assert_close(*results, tolerance=1e-3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(implementation, dtype):
    model = run_by(implementation, randomise(small_backbone(drop_path_rate=0.0)))
    x = torch.rand(2, 3, 64, 64)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', dtype, enabled=enabled):
            out = model(x)[0]
        out.float().square().mean().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.98


def test_drop_path_draws_the_same_numbers():
    """A training step that is repeated with another implementation drops the same branches."""
    model = randomise(small_backbone(drop_path_rate=0.5))
    x = torch.rand(4, 3, 64, 64)
    results = []
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(3)
        results.append(run_by(implementation, copy.deepcopy(model))(x)[0])
    for result in results[1:]:
        assert_close([result], [results[0]], tolerance=1e-3)


def test_inputs_and_outputs_are_left_alone(implementation):
    """Neither the images nor features that were given out are written to."""
    model = run_by(implementation, randomise(small_backbone(out_indices=(0, 1, 2, 3))).eval())
    x = torch.rand(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        first = model(x)
        saved = [feature.clone() for feature in first]
        model(torch.rand_like(x))
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    for feature, copied in zip(first, saved):
        torch.testing.assert_close(feature, copied, rtol=0, atol=0)


def test_training_on_one_pixel_is_refused(implementation):
    """BN has no variance there; PyTorch says so, whatever runs."""
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        run_by(implementation, small_backbone(img_size=32).train())(torch.rand(1, 3, 32, 32))
