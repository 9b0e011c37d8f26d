"""Depthwise convolutions that preserve the map's size, alone or after BN and GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from . import norm_gelu
from .autograd import is_differentiated, needs_gradient, reference_gradients

operators = torch.ops.mmstrip


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve (N, C, H, W) with (C, 1, K_h, K_w), odd sides up to 7."""
    return (_Depthwise.apply if needs_gradient(x, weight) else operators.depthwise)(x, weight)


def norm_gelu_depthwise(x: Tensor, norm: nn.BatchNorm2d, weight: Tensor) -> Tensor:
    """:func:`depthwise` of GELU(BN(x)); only x is saved for backward."""
    layer = norm_gelu.layer_arguments(norm, x.shape[1], x)
    if needs_gradient(x, weight, *layer[:2]):
        return _NormGELUDepthwise.apply(x, weight, *layer[:2], layer[2:])
    return operators.norm_gelu_depthwise(x, weight, *layer)[0]


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return operators.depthwise(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        required = ctx.needs_input_grad
        inputs = ctx.saved_tensors
        if is_differentiated([grad]):
            return tuple(reference_gradients(reference, inputs, [grad], required))
        return operators.depthwise_backward(grad, *inputs, required)


class _NormGELUDepthwise(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, layer: tuple) -> Tensor:
        out, norm = operators.norm_gelu_depthwise(x, weight, norm_weight, norm_bias, *layer)
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, norm)
        *_, ctx.training, _, ctx.eps = layer
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, norm = ctx.saved_tensors
        required = ctx.needs_input_grad[:4]
        if is_differentiated([grad]):
            fixed = norm_gelu.frozen_statistics(norm, ctx.training, ctx.eps)

            def recompute(x, weight, *affine):
                return reference(norm_gelu.reference(x, *affine, *fixed, ctx.eps), weight)

            return *reference_gradients(recompute, inputs, [grad], required), None
        grads = operators.norm_gelu_depthwise_backward(grad, *inputs[:2], norm, ctx.training, required)
        return *grads, None
