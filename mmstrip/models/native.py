"""Operators compiled from ``mmstrip/csrc``: what eager PyTorch does in several passes over memory, in one.

Optional: without them (not built, or switched off by the environment's MMSTRIP_NATIVE=0) :mod:`mmstrip.models.ops` has
another form of everything. They take float32 maps on CPUs, in eager mode.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..csrc import extension_name

operators = torch.ops.mmstrip
PLAIN = Tensor, nn.Parameter


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

    Not on empty maps, nor where a graph is recorded, operations are counted or replaced, or autocast may
    want another precision.
    """
    if not _enabled or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if not tensors[0].numel():
        return False
    for tensor in tensors:  # a loop, as this runs some hundred times in every forward
        if type(tensor) not in PLAIN or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return True


def has_width(weight: Tensor) -> bool:
    """Whether a depthwise kernel (C, 1, K_h, K_w) is of a width that the operators are compiled for."""
    return weight.shape[3] in (1, 3, 5, 7)


class Depthwise(Function):
    """Depthwise convolution of (N, C, H, W) with (C, 1, K_h, K_w)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return operators.depthwise(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return operators.depthwise_backward(grad, *ctx.saved_tensors)


class NormGELUDepthwise(Function):
    """Depthwise convolution of what GELU makes of BN; x alone is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, statistics: tuple) -> Tensor:
        out, norm = operators.norm_gelu_depthwise(x, weight, norm_weight, norm_bias, *statistics)
        ctx.save_for_backward(x, weight, norm)
        ctx.training = statistics[2]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *operators.norm_gelu_depthwise_backward(grad, *ctx.saved_tensors, ctx.training), None


class Pointwise(Function):
    """1x1 convolution of concatenated maps."""

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        ctx.biased = bias is not None
        return operators.pointwise(parts, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        grads, grad_weight = operators.pointwise_backward(grad, parts, weight)
        return grad_weight, operators.pixel_sums(grad) if ctx.biased else None, *grads


class PointwiseNormGELU(Function):
    """That, BN and GELU, cut into equal parts; the map in front of BN is kept."""

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        statistics: tuple,
        chunks: int,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        norm_layer = norm_weight, norm_bias, *statistics
        out, x, norm = operators.pointwise_norm_gelu_forward(parts, weight, bias, *norm_layer, chunks)
        ctx.save_for_backward(weight, x, norm, *parts)
        ctx.biased, ctx.training = bias is not None, statistics[2]
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, norm, *parts = ctx.saved_tensors
        grads, grad_weight, grad_bias, *grad_norm = operators.pointwise_norm_gelu_backward(
            grads, parts, weight, x, norm, ctx.training
        )
        return grad_weight, grad_bias if ctx.biased else None, *grad_norm, None, None, *grads


class LocalStrips(Function):
    """LSMM: u (N, C, H, W), kernels (C, 1, 7, 3) and (C, 1, 3, 7), weights and biases of the two layers of its MLP."""

    @staticmethod
    def forward(ctx, u: Tensor, tall: Tensor, wide: Tensor, *mlp: Tensor) -> Tensor:
        out, *kept = operators.local_strips(u, tall, wide, *mlp)
        ctx.save_for_backward(u, tall, wide, mlp[0], mlp[2], *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return operators.local_strips_backward(grad, *ctx.saved_tensors)


class StripLayer(Function):
    """As :func:`.ops.strip_layer`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, row: bool, position: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, position)
        ctx.row, ctx.bias_map = row, bias.dim() == 3
        return operators.strip_layer(x, weight, bias, row, position)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, position = ctx.saved_tensors
        *grads, grad_position = operators.strip_layer_backward(grad, x, weight, ctx.row, ctx.bias_map, position)
        return *grads, None, grad_position if position is not None else None


class ChannelMLP(Function):
    """As :func:`.ops.channel_mlp`, with the arguments of the operator."""

    @staticmethod
    def forward(ctx, x: Tensor, *layers) -> Tensor:
        out, *kept = operators.channel_mlp_forward(x, *layers)
        norm_weight, norm_bias, _, expand, expand_bias, gamma, beta, ctx.eps, reduce, _ = layers
        ctx.save_for_backward(x, norm_weight, norm_bias, expand, expand_bias, gamma, beta, reduce, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *layers, beta, reduce, rows, mean, inverse, hidden, norm = ctx.saved_tensors
        kept = rows, mean, inverse, hidden, norm
        x, norm_weight, norm_bias, *expand, gamma, beta_grad, reduce_grad, bias = operators.channel_mlp_backward(
            grad, *layers, beta, ctx.eps, reduce, *kept
        )
        if layers[1] is None:
            norm_weight = norm_bias = None
        beta_grad = None if beta is None else beta_grad
        return x, norm_weight, norm_bias, None, *expand, gamma, beta_grad, None, reduce_grad, bias


class SplitWindows(Function):
    """Windows (M, C, *extent) of a map (N, C, H, W), as :mod:`.windows` lays them out."""

    @staticmethod
    def forward(ctx, x: Tensor, extent: tuple[int, int], counts: list[int], strides: list[int]) -> Tensor:
        ctx.layout = x.shape[2:], counts, strides
        return operators.split_windows(x, extent, counts, strides)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return operators.merge_windows(grad, *ctx.layout, mean=False), None, None, None


class MergeWindows(Function):
    """Windows back to a map of a size (H, W), overlaps averaged."""

    @staticmethod
    def forward(ctx, x: Tensor, size: tuple[int, int], counts: list[int], strides: list[int]) -> Tensor:
        ctx.layout = x.shape[2:], counts, strides
        return operators.merge_windows(x, size, counts, strides)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return operators.split_windows(grad, *ctx.layout, mean=True), None, None, None
