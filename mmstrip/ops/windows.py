"""Cutting a map into overlapping windows, and putting them back; see :mod:`mmstrip.models.windows` for their layout.

``size`` is (H, W), ``extent`` the height and width of a window. Along an axis there are ``counts`` windows, whose
starts are ``strides`` apart, but for the last one, which ends with the map.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from .autograd import is_batched, reference_gradients
from .dispatch import native_types

operators = torch.ops.mmstrip


def split_windows(x: Tensor, extent, counts, strides) -> Tensor:
    """Cut (N, C, H, W), no smaller than a window, into (N * rows * columns, C, *extent)."""
    if native_types(x):
        return _Windows.apply(x, False, extent, counts, strides, False)
    return split_reference(x, extent, counts, strides)


def merge_windows(x: Tensor, size, counts, strides) -> Tensor:
    """Put windows back into a map (N, C, *size); a token in two windows of an axis is their mean."""
    if native_types(x):
        return _Windows.apply(x, True, size, counts, strides, True)
    return merge_reference(x, size, counts, strides)


def split_reference(x: Tensor, extent, counts, strides) -> Tensor:
    for dim, side, count, stride in zip((2, 3), extent, counts, strides):
        if x.shape[dim] > side:
            starts = _starts(x.shape[dim], side, count, stride, x.device)
            x = x.index_select(dim, (starts[:, None] + torch.arange(side, device=x.device)).flatten())
    x = x.unflatten(3, (counts[1], extent[1])).unflatten(2, (counts[0], extent[0]))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def merge_reference(x: Tensor, size, counts, strides) -> Tensor:
    extent = x.shape[2:]
    x = x.unflatten(0, (-1, *counts)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    for dim, length, side, count, stride in zip((2, 3), size, extent, counts, strides):
        if length > side:
            first, last = _copies(length, side, count, stride, x.device)
            x = (x.index_select(dim, first) + x.index_select(dim, last)) * 0.5
    return x


def _starts(length: int, extent: int, count: int, stride: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) * stride).clamp(max=length - extent)


def _copies(length: int, extent: int, count: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where a token's copies in the first and in the last window that covers it are, among count * extent positions."""
    starts = _starts(length, extent, count, stride, device)
    token = torch.arange(length, device=device)
    # Window i < count - 1 starts at i * stride; only the last one may have been moved back.
    first = (torch.div(token - extent, stride, rounding_mode='floor') + 1).clamp(0, count - 1)
    last = torch.where(token >= length - extent, count - 1, torch.div(token, stride, rounding_mode='floor'))
    return tuple(window * extent + token - starts[window] for window in (first, last))


def _zeros(shape: torch.Size, grad: Tensor) -> Tensor:
    """A map to take gradients at, as cutting and merging are linear; not of the gradient's vmap level."""
    return torch.zeros(shape, dtype=grad.dtype, device=grad.device, requires_grad=True)


def _reference(merge: bool, *layout) -> Callable[[Tensor], Tensor]:
    return lambda x: (merge_reference if merge else split_reference)(x, *layout)


def _transposed(linear: Callable[[Tensor], Tensor], shape: torch.Size, grad: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes gradients of a linear function's outputs to those of its input, of that shape."""
    return lambda output: reference_gradients(linear, [_zeros(shape, grad)], [output])[0]


class _Windows(Function):
    """Windows of a map, each pixel as often as it is covered; or, to ``merge``, a map of its windows: their sums.

    With ``mean`` each window counts by its part in the mean. Each of the two is the gradient of the other.
    """

    @staticmethod
    def forward(ctx, x: Tensor, merge: bool, sides, counts, strides, mean: bool) -> Tensor:
        ctx.arguments = x.shape, merge, sides, counts, strides, mean
        return (operators.merge_windows if merge else operators.split_windows)(x, sides, counts, strides, mean)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, merge, sides, counts, strides, mean = ctx.arguments
        if is_batched([grad]):
            if merge == mean:
                run = _reference(merge, sides, counts, strides)
            else:  # sums are merged, and windows of a mean cut, as gradients of the references alone
                run = _transposed(_reference(not merge, shape[2:], counts, strides), grad.shape, grad)
            grad_x = _transposed(run, shape, grad)(grad)
        else:
            grad_x = _Windows.apply(grad, not merge, shape[2:], counts, strides, mean)
        return grad_x, None, None, None, None, None
