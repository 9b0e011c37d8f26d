"""BN, then GELU: in training only the input is saved for the backward pass, which normalises it once more."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .autograd import is_differentiated, reference_gradients


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, variance: Tensor | None = None, eps: float = 0
) -> Tensor:
    """GELU of BN of (N, C, H, W), with statistics (C, ) or, without them, those of x."""
    mean, variance = [None if value is None else value.to(weight.dtype) for value in (mean, variance)]
    return F.gelu(F.batch_norm(x, mean, variance, weight, bias, training=mean is None, eps=eps))


def norm_gelu(x: Tensor, norm: nn.Module) -> Tensor:
    """GELU of a BN layer's output, without operators.

    Args:
        x: (N, C, H, W).
        norm: With affine parameters and an exponential average of its statistics, which training moves; or an identity.
    """
    if isinstance(norm, nn.Identity):
        return F.gelu(x)
    return _NormGELU.apply(x, norm.weight, norm.bias, statistics(norm))


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, bool, float, float]:
    """BN's statistics and how to use them, as PyTorch and the operators take them; counts the batch in training."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps


def layer_arguments(norm: nn.Module, channels: int, like: Tensor) -> tuple:
    """A BN layer, or an identity in its place, as the operators take it."""
    if isinstance(norm, nn.Identity):
        ones, zeros = like.new_ones(channels), like.new_zeros(channels)
        return ones, zeros, zeros, ones, False, 0.0, 0.0
    return norm.weight, norm.bias, *statistics(norm)


def frozen_statistics(norm: Tensor, training: bool, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance for the reference, from what an operator returns of its norm; None in training."""
    return (None, None) if training else (norm[0], norm[1].square().reciprocal() - eps)


class _NormGELU(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, layer: tuple) -> Tensor:
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, *layer)
        running_mean, running_var, ctx.training, _, ctx.eps = layer
        if not ctx.training:
            mean, inverse = running_mean.clone(), (running_var + ctx.eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return F.gelu(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        required = ctx.needs_input_grad[:3]
        variance = inverse.square().reciprocal() - ctx.eps
        if is_differentiated([grad]):
            fixed = (None, None) if ctx.training else (mean, variance)
            again = reference_gradients(
                lambda *inputs: reference(*inputs, *fixed, ctx.eps), (x, weight, bias), [grad], required
            )
            return *again, None
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=ctx.eps)
        grad = torch.ops.aten.gelu_backward(grad, y)
        backward = torch.ops.aten.native_batch_norm_backward
        grads = backward(grad, x, weight, mean, variance, mean, inverse, ctx.training, ctx.eps, list(required))
        return *grads, None
