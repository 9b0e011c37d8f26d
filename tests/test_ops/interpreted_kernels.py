"""Values and gradients of Triton's kernels against ATen's; test_triton.py runs this in Triton's interpreter."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

from mmstrip.models.channel_mixing import GlobalResponseNorm
from mmstrip.models.strip_mixing import LocalStripMixing, RelativePosition, StripMLPLayer
from mmstrip.ops.gpu import depthwise, layer_norm, local_strips, norm_gelu, response_norm, strips
from mmstrip.ops.gpu.kernels import on_card

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def cases(*values, narrow=(torch.bfloat16, torch.float16)):
    """All in float32, the first in narrower types too."""
    both = [(value, torch.float32) for value in values] + [(values[0], dtype) for dtype in narrow]
    return pytest.mark.parametrize('case, dtype', both, ids=str)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def check(module, function, *inputs, dtype=torch.float32):
    """A function's results and gradients by kernels and by ATen, in float64 where kernels take narrower maps."""
    tensors = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
    assert on_card(tensors[0])
    outcomes = []
    for by_aten in (False, True):
        leaves = [tensor.detach().clone() for tensor in tensors]
        if by_aten:
            leaves = [leaf.double() for leaf in leaves]
        for leaf in leaves:
            leaf.requires_grad_()
        seen = iter(leaves)
        arguments = [next(seen) if isinstance(value, torch.Tensor) else value for value in inputs]
        with patch.object(module, 'on_card', lambda x: False) if by_aten else patch.object(module, 'on_card', on_card):
            y = function(*arguments)
            torch.manual_seed(1)
            y.backward(torch.randn(y.shape).to(y.dtype))
        outcomes.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for i, (ours, right) in enumerate(zip(*outcomes)):
        assert ours.shape == right.shape
        error = (ours.double() - right).norm() / (right.norm() + 1e-9)
        assert error < TOLERANCES[dtype], f'result {i} misses by {error:.1e}'


def fill(module, **tensors):
    """A module with tensors, by dotted name, in place of its parameters."""
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition('.')
        owner = module.get_submodule(owner)
        del owner._parameters[last]
        setattr(owner, last, tensor)
    return module


DEPTHWISE = cases(
    # channels, images, height, width, side, own kernels of images, beside
    (2, 2, 5, 4, 7, False, True),  # a map smaller than the kernel
    (1, 2, 1, 1, 3, False, False),
    (1, 1, 2, 35, 7, False, False),  # several tiles, with margins
    (1, 2, 17, 17, 3, True, True),  # several blocks of rows
    narrow=[torch.float16],  # the interpreter has no products of bfloat16
)


@DEPTHWISE
def test_depthwise(case, dtype):
    channels, images, height, width, side, own, beside = case
    x = draw(channels, images, height, width, dtype=dtype)
    weight = draw(channels, images if own else 1, side, side)
    more = [draw(*x.shape, dtype=dtype)] if beside else []
    check(depthwise, depthwise.depthwise, x, weight, *more, dtype=dtype)


STRIPS = cases(
    # channels, patches, images, height, width, strip width, axis, beside, before
    (2, 1, 2, 3, 5, 3, 'row', True, False),
    (2, 2, 1, 4, 3, 3, 'column', True, True),
    (1, 1, 1, 1, 1, 5, 'row', False, False),  # a strip wider than the map
    (2, 1, 1, 2, 18, 3, 'row', False, False),  # several tiles of tokens, positions by ATen
    (1, 1, 3, 29, 2, 3, 'row', False, False),  # several blocks of lines
    narrow=[torch.float16],
)


@STRIPS
def test_strips(case, dtype):
    channels, patches, images, height, width, strip_width, axis, beside, before = case
    tokens = width if axis == 'row' else height
    x = draw(channels, images, height, width, dtype=dtype)
    weight, bias = draw(patches, strip_width, tokens, tokens), draw(patches, tokens)
    table = draw(2 * (height if axis == 'row' else width) + 1, channels)
    more = draw(*x.shape, dtype=dtype) if beside else None

    def run(x, weight, bias, table, more=None):
        layer = fill(StripMLPLayer(tokens, patches, strip_width, axis), weight=weight, bias=bias)
        position = fill(RelativePosition(channels, (height, width), 1), table=table)
        return strips.strips(layer, x, position, more, before)

    largest = dict(block_size=lambda number, **bounds: 16, LARGEST_MAP=16) if width > 16 else {}
    with patch.multiple(strips, **largest) if largest else nullcontext():
        check(strips, run, x, weight, bias, table, *([] if more is None else [more]), dtype=dtype)


@cases((2, 2, 3, 5), (1, 3, 17, 100), (3, 1, 2, 1))
def test_norm_gelu(case, dtype):
    x = draw(*case, dtype=dtype) * 2 + 3
    kept = []

    def run(x, weight, bias, shift):
        norm = fill(torch.nn.BatchNorm2d(case[0]).to(weight.dtype), weight=weight, bias=bias)
        y, same = norm_gelu.norm_gelu(norm, x, shift, keeps=True)
        kept.append((norm.running_mean, norm.running_var, norm.num_batches_tracked))
        return y + 3 * same

    check(norm_gelu, run, x, draw(case[0]), draw(case[0]), draw(case[0]), dtype=dtype)
    for ours, right in zip(*kept):
        torch.testing.assert_close(ours.double(), right.double(), rtol=1e-4, atol=1e-4)
    assert kept[0][2] == 1


@cases((5, 2, 3, 4), (34, 1, 5, 13), (1, 1, 1, 2))
def test_layer_norm(case, dtype):

    def run(x, weight, bias):
        return layer_norm.layer_norm(fill(torch.nn.LayerNorm(case[0], eps=1e-3), weight=weight, bias=bias), x)

    check(layer_norm, run, draw(*case, dtype=dtype), draw(case[0]), draw(case[0]), dtype=dtype)


@cases((5, 2, 3, 4), (3, 1, 5, 17))
def test_response_norm(case, dtype):

    def run(x, bias, gamma, beta):
        grn = fill(GlobalResponseNorm(case[0]), gamma=gamma, beta=beta)
        return response_norm.gelu_response_norm(x, bias, grn)

    with patch.object(response_norm, 'CHANNELS', 4):  # several steps of sums over channels
        check(response_norm, run, draw(*case, dtype=dtype), *(draw(case[0]) for _ in range(3)), dtype=dtype)


@pytest.mark.parametrize(
    'shape, dtype', [((3, 2, 3, 2), torch.float32), ((2, 3, 1, 33), torch.bfloat16)], ids=str
)  # several steps of channels, parts of images, and tiles of a map
def test_local_strips(shape, dtype):
    reference = LocalStripMixing(shape[0])
    names = [name for name, _ in reference.named_parameters()]

    def run(x, *parameters):
        return local_strips.mix_locally(fill(LocalStripMixing(shape[0]), **dict(zip(names, parameters))), x)

    parameters = [parameter.detach() for parameter in reference.parameters()]
    sizes = patch.multiple(local_strips, CHANNELS=2, IMAGES=2)
    with sizes, patch.object(depthwise, 'on_card', lambda x: False):  # its kernel has tests of its own
        check(local_strips, run, draw(*shape, dtype=dtype), *parameters, dtype=dtype)


def test_gradients_are_the_same_every_time():
    x, weight = draw(2, 3, 5, 6), draw(2, 1, 3, 3)
    parts = [depthwise._depthwise_backward(x, x, weight)[1] for _ in range(2)]
    assert torch.equal(*parts)
