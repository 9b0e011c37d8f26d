"""LSMM (Section 3.4): two depthwise convolutions and the input itself, in a sum whose weights a small MLP draws."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import depthwise
from .autograd import is_differentiated, needs_gradient, reference_gradients

operators = torch.ops.mmstrip


def reference(u: Tensor, tall: Tensor, wide: Tensor, *mlp: Tensor) -> Tensor:
    paths = depthwise.reference(u, tall), depthwise.reference(u, wide), u
    return weighted_sum(paths, lambda average: F.conv2d(F.gelu(F.conv2d(average, *mlp[:2])), *mlp[2:]))


def weighted_sum(paths: tuple[Tensor, Tensor, Tensor], reweight, valid: Tensor | None = None) -> Tensor:
    """Sum of three maps (N, C, H, W) with weights for each channel: the softmax over the three of what ``reweight``
    makes (N, 3 C, 1, 1), channel by channel, of the average of their sum (N, C, 1, 1), over the tokens that are
    ``valid`` (N, 1, H, W), or over all."""
    tall, wide, u = paths
    total = tall + wide + u
    if valid is None:
        average = total.mean(dim=(2, 3), keepdim=True)
    else:
        dtype = torch.promote_types(total.dtype, torch.float32)  # sums may be too large for half precision
        sums = torch.where(valid, total, 0).sum(dim=(2, 3), keepdim=True, dtype=dtype)
        average = (sums / valid.sum(dim=(2, 3), keepdim=True)).to(total.dtype)
    weights = reweight(average).unflatten(1, (-1, 3)).softmax(dim=2)
    a, b, c = weights.to(u.dtype).unbind(dim=2)  # autocast takes the softmax in float32
    return a * tall + b * wide + c * u


def local_strips(
    u: Tensor, tall: Tensor, wide: Tensor, narrow: Tensor, narrow_bias: Tensor, broad: Tensor, broad_bias: Tensor
) -> Tensor:
    """LSMM of (N, C, H, W).

    Args:
        u: (N, C, H, W).
        tall: (C, 1, 7, 3).
        wide: (C, 1, 3, 7).
        narrow, narrow_bias: First layer of the MLP, (E, C, 1, 1) and (E, ).
        broad, broad_bias: Second layer, after GELU, (3 C, E, 1, 1) and (3 C, ).

    Returns:
        (N, C, H, W).
    """
    arguments = u, tall, wide, narrow, narrow_bias, broad, broad_bias
    if needs_gradient(*arguments):
        return _LocalStrips.apply(*arguments)
    return operators.local_strips(*arguments)[0]


class _LocalStrips(Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        out, *saved = operators.local_strips(*inputs)
        ctx.save_for_backward(*inputs, *saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, saved = tensors[:7], tensors[7:]
        required = ctx.needs_input_grad
        if is_differentiated([grad]):
            return tuple(reference_gradients(reference, inputs, [grad], required))
        u, tall, wide, narrow, _, broad, _ = inputs
        return operators.local_strips_backward(grad, u, tall, wide, narrow, broad, *saved, required)
