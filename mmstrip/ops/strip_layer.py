"""The strip MLP layer (Section 3.2)."""

import torch
from torch import Tensor
from torch.autograd import Function

from ..models.strip_mixing import StripMLPLayer
from .autograd import call_formula, is_differentiated, needs_gradient, reference_gradients
from .fast import Fast

operators = torch.ops.mmstrip


class FastStripMLPLayer(Fast, StripMLPLayer):
    reference = StripMLPLayer

    def forward(self, x: Tensor) -> Tensor:
        if not self.may_run(x):
            return super().forward(x)
        return strip_layer(x, self)


def strip_layer(x: Tensor, layer: StripMLPLayer, position: Tensor | None = None) -> Tensor:
    """A strip layer on x (N, C, H, W), plus an optional position embedding (C, H, W)."""
    arguments = x, layer.weight, layer.bias, layer.axis == 'row', position
    if needs_gradient(x, layer.weight, layer.bias, position):
        return _StripLayer.apply(*arguments)
    return operators.strip_layer(*arguments)


class _StripLayer(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, row: bool, position: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, position)
        ctx.row = row
        return operators.strip_layer(x, weight, bias, row, position)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, position = ctx.saved_tensors
        required = *ctx.needs_input_grad[:3], ctx.needs_input_grad[4]
        if is_differentiated([grad]):
            axis = 'row' if ctx.row else 'column'

            def recompute(x, weight, bias, position):
                x = x if position is None else x + position
                return call_formula(StripMLPLayer, x, weight=weight, bias=bias, axis=axis)

            *grads, grad_position = reference_gradients(recompute, (x, weight, bias, position), [grad], required)
        else:
            *grads, grad_position = operators.strip_layer_backward(
                grad, x, weight, ctx.row, bias.dim() == 3, position, required
            )
        return *grads, None, grad_position
