"""bfloat16 maps: whatever runs, it is about as far from float64 as PyTorch's own layers in bfloat16 are.

Where operators do not take bfloat16, accelerated models run the reference, and status() says so.
"""

import copy

import pytest
import torch
from helpers import HAS_OPERATORS, operators_of, randomise, small_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from test_implementations import BOXES, EXTENT, OPERATORS, accelerated, loss_of, map_for
from torch import nn

import mmstrip
from mmstrip import ops
from mmstrip.models.channel_mixing import ChannelMixingBlock
from mmstrip.models.strip_mixing import CascadeGroupStripMixing, LocalStripMixing
from mmstrip.ops import stage

TAKES_BFLOAT16 = ops.takes(torch.bfloat16)
FORMS = ('autocast', 'bfloat16')
X = torch.rand(2, 3, 64, 64)


def autocast(form: str) -> torch.autocast:
    return torch.autocast('cpu', torch.bfloat16, enabled=form == 'autocast')


def run(box: nn.Module, x: torch.Tensor, form: str) -> list[torch.Tensor]:
    """The output, the gradients of the input and of all parameters, and the statistics, in bfloat16 maps."""
    box = copy.deepcopy(box).bfloat16() if form == 'bfloat16' else box
    inputs = [x.bfloat16().requires_grad_(), *box.parameters()]
    with autocast(form):
        out = box(inputs[0])
    found = torch.autograd.grad(loss_of(out.float()), inputs)
    assert out.dtype is torch.bfloat16
    assert all(gradient.dtype is value.dtype for gradient, value in zip(found, inputs))
    return [out, *found, *statistics_of(box)]


def statistics_of(box: nn.Module) -> list[torch.Tensor]:
    return [buffer for buffer in box.buffers() if buffer.is_floating_point()]


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-6)).item()


def assert_as_close(box: nn.Module, x: torch.Tensor, form: str) -> None:
    """Three times as far from the exact values as the reference at most, or a few roundings.

    Parameters are as bfloat16 holds them, so that they are no reason for a difference.
    """
    box = box.bfloat16().float()
    got, reference = run(accelerated(box), x, form), run(copy.deepcopy(box), x, form)
    box, x = box.double(), x.bfloat16().double().requires_grad_()
    out = box(x)
    expected = [out, *torch.autograd.grad(loss_of(out), [x, *box.parameters()]), *statistics_of(box)]
    largest = max(value.norm().item() for value in expected)
    for a, b, c in zip(got, reference, expected):
        if c.norm() >= 1e-3 * largest:  # a bias before BN has no gradient
            assert distance(a, c) <= max(3 * distance(b, c), 2**-5), (distance(a, c), distance(b, c))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', BOXES)
def test_values_and_gradients(name, training, form):
    box = randomise(BOXES[name]()).train(training)
    assert_as_close(box, map_for(box, images=4), form)


@given(
    size=st.tuples(st.integers(1, 3), st.integers(3, 13), st.integers(3, 12)),
    channels=st.sampled_from([2, 6, 10, 34]),
    name=st.sampled_from(['lsmm', 'channel mixing', 'cgsmm']),
    form=st.sampled_from(FORMS),
)
@settings(max_examples=30)
def test_any_map(size, channels, name, form):
    """Sizes that are windows, in windows and padded; odd depths of products, as pairs of inputs are multiplied."""
    images, *sides = size
    box = {
        'lsmm': lambda: LocalStripMixing(channels),
        'cgsmm': lambda: CascadeGroupStripMixing(channels, EXTENT, 2),
        'channel mixing': lambda: ChannelMixingBlock(channels, mlp_ratio=1.5),
    }[name]()
    assert_as_close(randomise(box).eval(), torch.randn(images, channels, *sides), form)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', OPERATORS)
def test_operators_stand_in(name, form):
    box = accelerated(randomise(BOXES[name]()).eval())
    box = box.bfloat16() if form == 'bfloat16' else box
    x = map_for(box).bfloat16()
    with torch.no_grad(), autocast(form):
        assert operators_of(lambda: box(x)) == (OPERATORS[name] if TAKES_BFLOAT16 else set())
    assert ('bfloat16 maps' in ops.status()) == TAKES_BFLOAT16


@pytest.mark.skipif(not HAS_OPERATORS, reason=ops.status())
def test_where_operators_step_aside():
    """What the reference refuses or gives another type is left to it."""
    box = accelerated(randomise(BOXES['channel mixing']()).eval())
    x = map_for(box)

    def operators(x, dtype=None):
        with torch.no_grad(), torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            return operators_of(lambda: box(x))

    assert not operators(x, torch.bfloat16)  # its first convolution gives bfloat16, but no norm before one would
    assert not operators(x.bfloat16(), torch.float16)
    with pytest.raises(RuntimeError):
        box(x.bfloat16())
    box.bfloat16()
    box.norm.float()
    assert not operators(x.bfloat16())
    box.norm.bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not operators(x.bfloat16())
    assert bool(operators(x.bfloat16())) == TAKES_BFLOAT16


@pytest.mark.parametrize('size', [(64, 64), (97, 75)])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('deployed', [False, True])
def test_features_stay_close(deployed, form, size):
    """Within 2 % of the largest feature of float32, in maps that are windows, in windows and padded."""
    model = randomise(small_backbone(out_indices=(0, 1, 2, 3))).eval()
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        mmstrip.accelerate(model)
        if deployed:
            model.switch_to_deploy()
        if form == 'bfloat16':
            model, x = model.bfloat16(), x.bfloat16()
        with autocast(form):
            features = model(x)
            types = [feature.dtype for feature in mmstrip.restore(model)(x)]
    for feature, other, dtype in zip(features, expected, types):
        assert feature.dtype is dtype
        assert (feature.float() - other).abs().max() < 0.02 * other.abs().max()


@pytest.mark.skipif(not TAKES_BFLOAT16, reason=ops.status())
def test_a_stage_is_packed_for_what_it_runs():
    model = mmstrip.accelerate(randomise(small_backbone(deploy=True)).eval())
    first = model.stages[0]
    with torch.no_grad():
        for form in ('', 'autocast', ''):
            with autocast(form):
                assert operators_of(lambda: model(X)) == set()  # whole stages, not one operator each
            assert stage._packed[first].dtype is (torch.bfloat16 if form else torch.float32)
        model.bfloat16()
        model(X.bfloat16())
        packed = stage._packed[first]
        assert packed.is_current(first, packed.types)
        first[0].channel_mixing.fc1.weight[0] += 1
        assert not packed.is_current(first, packed.types)


def test_second_derivatives():
    """Under autocast the reference is computed again under autocast."""
    box = randomise(BOXES['strip mixing']())
    found = []
    for module in (accelerated(box), box):
        x = map_for(box).bfloat16().requires_grad_()
        with autocast('autocast'):
            out = module(x)
        (first,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        first.float().square().sum().backward()
        found.append(torch.cat([value.grad.flatten() for value in module.parameters() if value.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95
