"""Channel mixing: the depthwise convolution, then LayerNorm, linear, GELU, GRN and linear as one operator."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..models import stock
from ..models.channel_mixing import ChannelMixingBlock, GlobalResponseNorm
from .autograd import call_formula, is_differentiated, needs_gradient, reference_gradients
from .depthwise import depthwise
from .fast import Fast

operators = torch.ops.mmstrip


class FastChannelMixingBlock(Fast, ChannelMixingBlock):
    reference = ChannelMixingBlock
    layers = dict(
        depthwise=stock.depthwise(7, 7),
        norm=stock.layer_norm,
        fc1=stock.linear,
        act=stock.gelu,
        grn=stock.response_norm,
        fc2=stock.linear,
    )

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if valid is not None or not self.may_run(x):
            return super().forward(x, valid=valid)
        return channel_mlp(depthwise(x, self.depthwise.weight), self.norm, self.fc1, self.grn, self.fc2)


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
    return call_formula(
        ChannelMixingBlock,
        x,
        depthwise=lambda x: x,
        norm=lambda x: F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps),
        fc1=lambda x: F.linear(x, expand, expand_bias),
        act=F.gelu,
        grn=lambda x: call_formula(GlobalResponseNorm, x, gamma=gamma, beta=beta, eps=eps),
        fc2=lambda x: F.linear(x, reduce, reduce_bias),
    )


def channel_mlp(x: Tensor, norm: nn.LayerNorm, expand: nn.Linear, grn: nn.Module, reduce: nn.Linear) -> Tensor:
    """LayerNorm, linear, GELU, GRN and linear layer on (N, C, H, W), with the parameters of these layers."""
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

            def recompute(x, norm_weight, norm_bias, expand, expand_bias, gamma, beta, reduce, reduce_bias):
                grn = gamma, beta, eps
                return reference(x, norm_weight, norm_bias, norm_eps, expand, expand_bias, *grn, reduce, reduce_bias)

            grads = reference_gradients(recompute, inputs, [grad], required)
        else:
            grads = operators.channel_mlp_backward(grad, *inputs[:7], eps, inputs[7], *saved, required)
            grads = [grad if need else None for grad, need in zip(grads, required)]
        return *grads[:3], None, *grads[3:7], None, *grads[7:]
