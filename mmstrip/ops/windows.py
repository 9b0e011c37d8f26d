"""Splitting a map into overlapping windows and merging them; see :mod:`mmstrip.models.windows` for the layout.

``size`` is (H, W), ``extent`` the height and width of a window. An axis has ``counts`` windows that start ``strides``
apart, except for the last one, which ends with the map.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from ..models import windows
from ..models.windows import Pair
from .autograd import reference_gradients
from .context import is_batched

operators = torch.ops.mmstrip


def split_windows(x: Tensor, extent: Pair, counts: Pair, strides: Pair) -> Tensor:
    """:func:`mmstrip.models.windows.split_windows`."""
    return _Windows.apply(x, False, extent, counts, strides, False)


def merge_windows(x: Tensor, size: Pair, counts: Pair, strides: Pair) -> Tensor:
    """:func:`mmstrip.models.windows.merge_windows`."""
    return _Windows.apply(x, True, size, counts, strides, True)


def _zeros(shape: torch.Size, grad: Tensor) -> Tensor:
    """A map at which to take gradients of linear functions; outside the gradient's vmap level."""
    return torch.zeros(shape, dtype=grad.dtype, device=grad.device, requires_grad=True)


def _reference(merge: bool, *layout) -> Callable[[Tensor], Tensor]:
    return lambda x: (windows.merge_windows if merge else windows.split_windows)(x, *layout)


def _transposed(linear: Callable[[Tensor], Tensor], shape: torch.Size, grad: Tensor) -> Callable[[Tensor], Tensor]:
    """The transpose of a linear function of a map of that shape: from output to input gradients."""
    return lambda output: reference_gradients(linear, [_zeros(shape, grad)], [output])[0]


class _Windows(Function):
    """Split a map into windows or, with ``merge``, sum windows into a map; each is the gradient of the other.

    With ``mean``, windows are weighted by their part in the mean.
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
            else:  # merging sums and splitting a mean are only gradients of the references
                run = _transposed(_reference(not merge, shape[2:], counts, strides), grad.shape, grad)
            grad_x = _transposed(run, shape, grad)(grad)
        else:
            grad_x = _Windows.apply(grad, not merge, shape[2:], counts, strides, mean)
        return grad_x, None, None, None, None, None
