"""Operators compiled from ``mmstrip/csrc``: what eager PyTorch does in several passes over memory, in one.

Optional: without them (not built, or switched off by the environment's MMSTRIP_NATIVE=0) :mod:`mmstrip.models.ops` has
another form of everything. They take float32 maps on CPUs, in eager mode.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..csrc import extension_name

operators = torch.ops.mmstrip


def _load() -> bool:
    spec = importlib.util.find_spec(extension_name())
    if spec is None or os.environ.get('MMSTRIP_NATIVE') == '0':
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        warnings.warn(f'mmstrip runs without its compiled operators, which do not load: {error}', stacklevel=2)
        return False
    return True


_enabled = _load()


def in_use() -> bool:
    """Whether the operators are there and switched on."""
    return _enabled


@contextmanager
def switched_off() -> Iterator[None]:
    """Within it nothing runs on the operators, but for backward passes of what did."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def fits(*tensors: Tensor) -> bool:
    """Whether the operators may run on these tensors here.

    Not where a graph is recorded, operations are counted or replaced, or autocast may want another precision.
    """
    if not _enabled or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == 'cpu' and tensor.dtype == torch.float32
        for tensor in tensors
    )


def has_width(weight: Tensor) -> bool:
    """Whether a depthwise kernel (C, 1, K_h, K_w) is of a width that the operators are compiled for."""
    return weight.shape[3] in (1, 3, 5, 7)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of (N, C, H, W) with (C, 1, K_h, K_w), of a width that :func:`has_width`."""
    return _Depthwise.apply(x, *_taps(weight))


def affine_gelu_depthwise(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """:func:`depthwise` of ``gelu(x * scale + shift)``, scale and shift (C, ); without gradients."""
    return operators.depthwise(_channels_last(x), *_taps(weight), scale, shift)


def _taps(weight: Tensor) -> tuple[Tensor, list[int]]:
    """Weights (C, 1, K_h, K_w) as the operators take them: (1, C, taps) and the widths of the kernel's rows."""
    return weight.flatten(1)[None], [weight.shape[3]] * weight.shape[2]


class _Depthwise(Function):
    """Depthwise convolution with weights (1, C, taps), or (N, C, taps) where each image has its own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, rows: list[int]) -> Tensor:
        x = _channels_last(x)
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return operators.depthwise(x, weight, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = _channels_last(grad)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = operators.depthwise(grad, weight.flip(2), ctx.rows)
        if ctx.needs_input_grad[1]:
            grad_weight = operators.depthwise_weight_grad(grad, x, ctx.rows)
            grad_weight = grad_weight.sum_to_size(weight.shape)
        return grad_x, grad_weight, None


# Outline of the cross that the 7x3 and the 3x7 kernel make together, as widths of its rows.
CROSS = [3, 3, 7, 7, 7, 3, 3]
# And its taps' places in 7x7 ones.
CROSS_TAPS = torch.tensor([7 * row + (7 - width) // 2 + k for row, width in enumerate(CROSS) for k in range(width)])


def cross_convolution(u: Tensor, tall: Tensor, wide: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """LSMM as :func:`.ops.local_strips` has it: linear in u but for the weights of its three paths.

    So sums of u under each tap give the total of the paths (N, C, 1, 1), from which ``weigh`` draws their weights
    (N, C, 3, 1, 1), and a depthwise convolution with one kernel an image is their weighted sum.
    """
    channels = u.shape[1]
    kernels = u.new_zeros(3, channels, 7, 7)
    kernels[0, :, :, 2:5] = tall[:, 0]
    kernels[1, :, 2:5] = wide[:, 0]
    kernels[2, :, 3, 3] = 1
    kernels = kernels.flatten(2).index_select(2, CROSS_TAPS)  # (3, C, taps)
    total = (_TapSums.apply(u, CROSS) * kernels.sum(0)).sum(2)[:, :, None, None]
    weights = weigh(total)[..., 0, 0]  # (N, C, 3)
    combined = torch.einsum('ncp,pct->nct', weights, kernels)
    return _Depthwise.apply(u, combined, CROSS)


class _TapSums(Function):
    """Sums (N, C, taps) of what each tap of a depthwise kernel sees of (N, C, H, W)."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: list[int]) -> Tensor:
        x = _channels_last(x)
        ctx.rows, ctx.shape = rows, x.shape
        return operators.tap_sums(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ones = _channels_last(grad.new_ones(ctx.shape))
        return operators.depthwise(ones, grad.flip(2), ctx.rows), None


def strip_layer(x: Tensor, weight: Tensor, bias: Tensor, axis: str, position: Tensor | None) -> Tensor:
    """As :func:`.ops.strip_layer`."""
    return _StripLayer.apply(x, weight, bias, axis, position)


class _StripLayer(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, axis: str, position: Tensor | None) -> Tensor:
        x, weight = _channels_last(x), weight.contiguous()
        ctx.save_for_backward(x, weight, position)
        ctx.row, ctx.bias_dim = axis == 'row', bias.dim()
        return operators.strip_layer(x, weight, bias, ctx.row, position)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, position = ctx.saved_tensors
        grad = _channels_last(grad)
        grad_x = grad_weight = grad_bias = grad_position = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
            grad_x = operators.strip_layer_input_grad(grad, weight, ctx.row)
        if ctx.needs_input_grad[1]:
            grad_weight = operators.strip_layer_weight_grad(grad, x, *weight.shape[:2], ctx.row, position)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
            if ctx.bias_dim == 2:
                lines = grad_bias.sum(1 if ctx.row else 2)  # (C, tokens)
                grad_bias = lines.unflatten(0, (-1, len(weight))).sum(0)
        if ctx.needs_input_grad[4]:
            grad_position = grad_x.sum(0)
        return grad_x, grad_weight, grad_bias, None, grad_position


def affine_gelu(x: Tensor, scale: Tensor, shift: Tensor, parts: int) -> list[Tensor]:
    """``gelu(x * scale + shift)`` of (N, C, H, W), in equal parts of the channels; without gradients."""
    return operators.affine_gelu(_channels_last(x), scale, shift, parts)


class NormGELU(Function):
    """BN and GELU with gradients, as :class:`.ops._NormGELU`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, statistics: tuple, parts: int) -> tuple[Tensor, ...]:
        mean, variance, ctx.training, momentum, eps = statistics
        x = _channels_last(x)
        if ctx.training:
            running_mean, running_variance = mean, variance
            mean, variance = operators.channel_moments(x)
            count = x.numel() // x.shape[1]
            running_mean.lerp_(mean, momentum)
            running_variance.lerp_(variance * (count / max(count - 1, 1)), momentum)
        inverse = (variance + eps).rsqrt()
        scale = weight * inverse
        shift = bias - mean * scale
        ctx.save_for_backward(x, mean.clone(), inverse, scale, shift)
        return tuple(operators.affine_gelu(x, scale, shift, parts))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, scale, shift = ctx.saved_tensors
        grads = [_channels_last(grad) for grad in grads]
        grad, grad_bias, product = operators.affine_gelu_backward(grads, x, scale, shift, mean)
        grad_weight = product * inverse
        slope = offset = torch.zeros_like(scale)
        if ctx.training:  # x moves its mean and its variance too
            count = x.numel() // x.shape[1]
            slope = -scale * inverse * grad_weight / count
            offset = -scale * grad_bias / count - slope * mean
        operators.combine_(grad, x, scale, slope, offset)
        return grad, grad_weight, grad_bias, None, None
