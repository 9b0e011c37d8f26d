"""1x1 convolutions of concatenated maps without concatenating them, alone or followed by BN and GELU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from . import norm_gelu
from .autograd import is_differentiated, needs_gradient, reference_gradients

operators = torch.ops.mmstrip


def reference(weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
    return F.conv2d(torch.cat(parts, dim=1), weight, bias)


def pointwise(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of concatenated maps: the sum of one matrix product per map.

    Maps (N, C_i, H, W), weight (O, sum of C_i, 1, 1) and bias (O, ) give (N, O, H, W).
    """
    if needs_gradient(weight, bias, *parts):
        return _Pointwise.apply(weight, bias, *parts)
    return operators.pointwise(parts, weight, bias)


def pointwise_norm_gelu(
    parts: Sequence[Tensor], conv: nn.Conv2d, norm: nn.Module, chunks: int = 1
) -> tuple[Tensor, ...]:
    """:func:`pointwise` with a layer's parameters, BN (or identity) and GELU, in equal chunks of the channels.

    The map before BN is saved for backward.
    """
    layer = norm_gelu.layer_arguments(norm, conv.out_channels, conv.weight)
    if needs_gradient(conv.weight, conv.bias, *parts, *layer[:2]):
        return _PointwiseNormGELU.apply(conv.weight, conv.bias, *layer[:2], layer[2:], chunks, *parts)
    return tuple(operators.pointwise_norm_gelu(parts, conv.weight, conv.bias, *layer, chunks))


class _Pointwise(Function):
    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, bias, *parts)
        return operators.pointwise(parts, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *parts = ctx.saved_tensors
        required = ctx.needs_input_grad
        if is_differentiated([grad]):
            return tuple(reference_gradients(reference, (weight, bias, *parts), [grad], required))
        grads, grad_weight, grad_bias = operators.pointwise_backward(grad, parts, weight, required)
        return grad_weight, grad_bias, *_required_only(required[2:], grads)


class _PointwiseNormGELU(Function):
    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        layer: tuple,
        chunks: int,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        arguments = weight, bias, norm_weight, norm_bias, *layer, chunks
        out, x, norm = operators.pointwise_norm_gelu_forward(parts, *arguments)
        ctx.save_for_backward(weight, bias, norm_weight, norm_bias, x, norm, *parts)
        *_, ctx.training, _, ctx.eps = layer
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *affine, x, norm = (tensors := ctx.saved_tensors)[:6]
        parts = tensors[6:]
        required = *ctx.needs_input_grad[:4], *ctx.needs_input_grad[6:]
        if is_differentiated(grads):
            inputs = weight, bias, *affine, *parts
            run = _reference_function(norm, bias, len(grads), ctx)
            grads = reference_gradients(run, inputs, grads, required)
            return *grads[:4], None, None, *grads[4:]
        out, *rest = operators.pointwise_norm_gelu_backward(grads, parts, weight, x, norm, ctx.training, required)
        return *rest, None, None, *_required_only(required[4:], out)


def _reference_function(norm: Tensor, bias: Tensor | None, chunks: int, ctx):
    """The reference of pointwise_norm_gelu with the statistics of the forward pass."""
    mean, variance = norm_gelu.frozen_statistics(norm, ctx.training, ctx.eps)
    if mean is not None and bias is not None:
        mean = mean + bias.detach()  # the operator computes statistics without the bias

    def run(weight, bias, norm_weight, norm_bias, *parts):
        x = reference(weight, bias, *parts)
        return norm_gelu.reference(x, norm_weight, norm_bias, mean, variance, ctx.eps).chunk(chunks, dim=1)

    return run


def _required_only(required: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
    return [grad if need else None for need, grad in zip(required, grads)]
