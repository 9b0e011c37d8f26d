"""Where there are no operators: less memory in training, in plain PyTorch, by computing more again in backward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..models.channel_mixing import SMALLEST_NORM, ChannelMixingBlock, GlobalResponseNorm, token_norm
from ..models.strip_mixing import CascadeGroupStripMixing, StripMixingBlock
from .autograd import call_formula, is_differentiated, reference_gradients
from .channel_mlp import FastChannelMixingBlock
from .context import are_plain, is_ordinary
from .fast import Fast, Types
from .norm_gelu import reference, statistics
from .strip_mixing import FastCascadeGroupStripMixing, FastStripMixingBlock

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Saving(Fast):
    @staticmethod
    def parameter_types(x: Tensor) -> Types:
        return TYPES if torch.is_grad_enabled() and is_ordinary() and are_plain(x) else ()


class SavingCascadeGroupStripMixing(Saving, CascadeGroupStripMixing):
    reference = CascadeGroupStripMixing
    layers = FastCascadeGroupStripMixing.layers

    def mix_window(self, u: Tensor) -> Tensor:
        if not self.may_run(u):
            return super().mix_window(u)
        r = self.row(self.position_row(u))
        v = norm_gelu(self.fuse_row(torch.cat([r, u], dim=1)), self.norm)
        c = self.column(self.position_column(v if self.cascade else u))
        return c if self.cascade else torch.cat([v, c], dim=1)


class SavingStripMixingBlock(Saving, StripMixingBlock):
    reference = StripMixingBlock
    layers = FastStripMixingBlock.layers

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        if not self.may_run(x):
            return super().forward(x, **valid)
        norm, _, conv = self.depthwise
        x = conv(norm_gelu(x, norm))
        conv, norm, _ = self.project
        parts = norm_gelu(conv(x), norm).chunk(len(self.branches), dim=1)
        return self.fuse(torch.cat(self.mix(parts, **valid), dim=1))


class SavingChannelMixingBlock(Saving, ChannelMixingBlock):
    reference = ChannelMixingBlock
    layers = FastChannelMixingBlock.layers

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if valid is not None or not self.may_run(x):
            return super().forward(x, valid=valid)
        x = self.fc1(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return gelu_response_norm_linear(x, self.grn, self.fc2).permute(0, 3, 1, 2)


def norm_gelu(x: Tensor, norm: nn.Module) -> Tensor:
    """GELU of the output of BN, or of an identity in its place: x (N, C, H, W) alone is saved for backward."""
    if isinstance(norm, nn.Identity):
        return F.gelu(x)
    return _NormGELU.apply(x, norm.weight, norm.bias, statistics(norm))


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


def gelu_response_norm_linear(x: Tensor, grn: nn.Module, linear: nn.Linear) -> Tensor:
    """GELU, GRN and a linear layer: x (N, H, W, C) alone is saved for backward."""
    weight, bias = linear.weight, linear.bias
    if torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    beta = None if grn.beta is None else grn.beta.to(x.dtype)
    return _GELUResponseNormLinear.apply(x, grn.gamma, beta, grn.eps, weight, bias)


class _GELUResponseNormLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.gelu(x)
        norm = token_norm(y)
        ctx.save_for_backward(x, gamma, beta, weight, bias, norm)
        ctx.eps = eps
        return F.linear(_shifted(y.mul_(_factor(norm, gamma, eps).to(y.dtype)), beta), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, bias, norm = ctx.saved_tensors
        required = *ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]
        if is_differentiated([grad]):

            def again(x, gamma, beta, weight, bias):
                y = call_formula(GlobalResponseNorm, F.gelu(x), gamma=gamma, beta=beta, eps=ctx.eps)
                return F.linear(y, weight, bias)

            grads = reference_gradients(again, (x, gamma, beta, weight, bias), [grad], required)
            return *grads[:3], None, *grads[3:]
        y = F.gelu(x)
        factor = _factor(norm, gamma, ctx.eps).to(x.dtype)
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


def _factor(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return 1 + gamma * (norm / (norm.mean(dim=-1, keepdim=True) + eps))


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
