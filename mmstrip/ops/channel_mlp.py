"""LayerNorm, linear layer, GELU, GRN and linear layer of channel mixing; GRN alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .autograd import is_differentiated, needs_gradient, reference_gradients

operators = torch.ops.mmstrip
SMALLEST_NORM = 1e-12


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, valid: Tensor | None = None) -> Tensor:
    """GRN of (N, H, W, C); see :class:`mmstrip.models.channel_mixing.GlobalResponseNorm`."""
    norm = _token_norm(x if valid is None else torch.where(valid, x, 0))
    y = x * _response_factor(norm, gamma, eps).to(x.dtype)
    return y if beta is None else y + beta.to(y.dtype)


def _response_factor(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return 1 + gamma * (norm / (norm.mean(dim=-1, keepdim=True) + eps))


def _token_norm(x: Tensor) -> Tensor:
    """L2 norm over H and W of (N, H, W, C): (N, 1, 1, C), in at least float32, as squares overflow half precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.square().sum(dim=(1, 2), keepdim=True).clamp_min(SMALLEST_NORM**2).sqrt()  # it has no gradient at 0


def reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    expand: Tensor,
    expand_bias: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    reduce: Tensor,
    reduce_bias: Tensor,
) -> Tensor:
    x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm_weight, norm_bias, norm_eps)
    x = response_norm(F.gelu(F.linear(x, expand, expand_bias)), gamma, beta, eps)
    return F.linear(x, reduce, reduce_bias).permute(0, 3, 1, 2)


def channel_mlp(x: Tensor, norm: nn.LayerNorm, expand: nn.Linear, grn: nn.Module, reduce: nn.Linear) -> Tensor:
    """Mix the channels of (N, C, H, W) with the parameters of these layers."""
    norm_arguments = norm.weight, norm.bias, norm.eps
    layers = *norm_arguments, expand.weight, expand.bias, grn.gamma, grn.beta, grn.eps, reduce.weight, reduce.bias
    if needs_gradient(x, *[layer for layer in layers if isinstance(layer, Tensor)]):
        return _ChannelMLP.apply(x, *layers)
    return operators.channel_mlp(x, *layers)


class _ChannelMLP(Function):
    @staticmethod
    def forward(ctx, x: Tensor, *layers) -> Tensor:
        out, *saved = operators.channel_mlp_forward(x, *layers)
        norm_weight, norm_bias, norm_eps, expand, expand_bias, gamma, beta, eps, reduce, reduce_bias = layers
        parameters = norm_weight, norm_bias, expand, expand_bias, gamma, beta, reduce, reduce_bias
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.eps = norm_eps, eps
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, saved = tensors[:9], tensors[9:]
        norm_eps, eps = ctx.eps
        required = [need for i, need in enumerate(ctx.needs_input_grad) if i not in (3, 8)]
        if is_differentiated([grad]):

            def again(x, norm_weight, norm_bias, expand, expand_bias, gamma, beta, reduce, reduce_bias):
                grn = gamma, beta, eps
                return reference(x, norm_weight, norm_bias, norm_eps, expand, expand_bias, *grn, reduce, reduce_bias)

            grads = reference_gradients(again, inputs, [grad], required)
        else:
            grads = operators.channel_mlp_backward(grad, *inputs[:7], eps, inputs[7], *saved, required)
            grads = [grad if need else None for grad, need in zip(grads, required)]
        return *grads[:3], None, *grads[3:7], None, *grads[7:]


def gelu_response_norm_linear(x: Tensor, grn: nn.Module, linear: nn.Linear) -> Tensor:
    """GELU, GRN and a linear layer of (N, H, W, C), without operators: x alone is saved for the backward pass."""
    weight, bias = linear.weight, linear.bias
    if torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    beta = None if grn.beta is None else grn.beta.to(x.dtype)
    return _GELUResponseNormLinear.apply(x, grn.gamma, beta, grn.eps, weight, bias)


class _GELUResponseNormLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.gelu(x)
        norm = _token_norm(y)
        ctx.save_for_backward(x, gamma, beta, weight, bias, norm)
        ctx.eps = eps
        return F.linear(_shifted(y.mul_(_response_factor(norm, gamma, eps).to(y.dtype)), beta), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, bias, norm = ctx.saved_tensors
        required = *ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]
        if is_differentiated([grad]):

            def again(x, gamma, beta, weight, bias):
                return F.linear(response_norm(F.gelu(x), gamma, beta, ctx.eps), weight, bias)

            grads = reference_gradients(again, (x, gamma, beta, weight, bias), [grad], required)
            return *grads[:3], None, *grads[3:]
        y = F.gelu(x)
        factor = _response_factor(norm, gamma, ctx.eps).to(x.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        spare = y * factor
        grad_weight = flat.t() @ _shifted(spare, beta).flatten(0, 2) if required[3] else None
        grad_y = (flat @ weight).view(x.shape)
        grad_beta = grad_y.sum(dim=(0, 1, 2)) if required[2] else None
        wide = torch.promote_types(x.dtype, torch.float32)
        product = torch.mul(grad_y, y, out=spare).sum(dim=(1, 2), keepdim=True, dtype=wide)
        grad_gamma, slope = _response_norm_backward(product, norm, gamma, ctx.eps)
        grad_x = None
        if required[0]:
            grad_x = torch.ops.aten.gelu_backward(grad_y.mul_(factor).addcmul_(y, slope.to(y.dtype)), x)
        grad_bias = flat.sum(0) if required[4] else None
        return grad_x, grad_gamma.to(gamma.dtype) if required[1] else None, grad_beta, None, grad_weight, grad_bias


def _shifted(x: Tensor, beta: Tensor | None) -> Tensor:
    return x if beta is None else x + beta


def _response_norm_backward(product: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What GRN's factor hands on, given the sums of gradient times GRN's input y over the map.

    Returns:
        The gradient of gamma (C, ), and the factor (N, 1, 1, C) of y in the gradient of y.
    """
    mean = norm.mean(dim=-1, keepdim=True) + eps
    scale = norm / mean
    grad_gamma = (product * scale).sum(dim=(0, 1, 2))
    # The norm acts through the mean too.
    grad_scale = product * gamma
    grad_norm = (grad_scale - (grad_scale * scale).mean(dim=-1, keepdim=True)) / mean
    follows = norm > 1.001 * SMALLEST_NORM  # where it is not clamped
    return grad_gamma, torch.where(follows, grad_norm / norm, 0)
