"""The strip MLP layer's sum (Section 3.2); see :class:`mmstrip.models.strip_mixing.StripMLPLayer` for its formula."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .autograd import is_differentiated, needs_gradient, reference_gradients

operators = torch.ops.mmstrip


def reference(x: Tensor, weight: Tensor, bias: Tensor, axis: str) -> Tensor:
    """A grouped convolution over lines: tokens are its channels, patches its groups.

    Args:
        x: (N, C, H, W), the side that ``axis`` mixes along being the layer's tokens.
        weight: (G, strip_width, tokens, tokens).
        bias: (G, tokens), or a map (C, H, W).
        axis: 'row' or 'column'.

    Returns:
        (N, C, H, W).
    """
    patches, strip_width = map(int, weight.shape[:2])  # torch.jit.trace gives sizes as tensors
    x = x.transpose(2, 3) if axis == 'row' else x
    kernel = weight.permute(0, 2, 3, 1).flatten(0, 1)  # (G * tokens, tokens, strip_width)
    lines = x.unflatten(1, (-1, patches)).flatten(0, 1).flatten(1, 2)  # (N * C / G, G * tokens, lines)
    shared = bias.flatten() if bias.dim() == 2 else None
    y = F.conv1d(lines, kernel, shared, padding=strip_width // 2, groups=patches).reshape(x.shape)
    y = y.transpose(2, 3) if axis == 'row' else y
    return y if bias.dim() == 2 else y + bias


def strip_layer(x: Tensor, weight: Tensor, bias: Tensor, axis: str, position: Tensor | None = None) -> Tensor:
    """The same of x plus positions (C, H, W), if there are any."""
    run = _StripLayer.apply if needs_gradient(x, weight, bias, position) else operators.strip_layer
    return run(x, weight, bias, axis == 'row', position)


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

            def again(x, weight, bias, position):
                return reference(x if position is None else x + position, weight, bias, axis)

            *grads, grad_position = reference_gradients(again, (x, weight, bias, position), [grad], required)
        else:
            *grads, grad_position = operators.strip_layer_backward(
                grad, x, weight, ctx.row, bias.dim() == 3, position, required
            )
        return *grads, None, grad_position
