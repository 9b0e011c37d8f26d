"""Overlapping windows: how strip weights of a fixed extent serve a map of any size.

The strip layers of a stage are tied to the extent (tokens per row and column) that they were built for. MLP-DINO (IJCAI
2024) runs them on other sizes by cutting the map into overlapping windows of that extent and averaging where windows
overlap. Per axis, a map of ``length`` tokens and windows of ``extent`` tokens:

- a length up to the extent is one window, zero-padded at its end and cropped afterwards;
- otherwise there are ``n = round(length / extent + 0.5)`` windows that overlap by
  ``o = round((n * extent - length) / (n - 1) - 0.5)`` tokens (both rounded half to even), starting at
  ``i * (extent - o)``, a window that would pass the end being moved back to end there.

So every token is covered by one or two windows per axis, and cost grows linearly with the number of tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native


class AxisWindows(NamedTuple):
    """The windows along one axis of ``length`` tokens.

    Attributes:
        count: Number of windows ``n``.
        gather: (n * extent,) token that each window position reads.
        first, last: (length,) positions, among the n * extent, of a token's copy in the first and in the last window
            that covers it; the same position twice where one window covers it.
    """

    count: int
    gather: Tensor
    first: Tensor
    last: Tensor


def count_and_stride(length: int, extent: int) -> tuple[int, int]:
    """Number of windows along an axis and the distance between their starts, in integer arithmetic.

    Args:
        length: Tokens along the axis, more than ``extent``.
        extent: Tokens of a window.
    """
    # Without branches, so that a compiler needs no other graph for another length.
    pairs, rest = length // (2 * extent), length % (2 * extent)
    count = 2 * pairs + (rest + 2 * extent - 1) // (2 * extent) + rest // extent
    overlap, rest = (count * extent - length) // (count - 1), (count * extent - length) % (count - 1)
    exact = 1 - (rest + count - 2) // (count - 1)
    return count, extent - overlap + exact * (overlap % 2)


def counts_and_strides(size: tuple[int, int], extent: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same of both axes, of a map (H, W) that is no smaller than a window; the stride of a lone window is 0."""
    axes = [count_and_stride(length, side) if length > side else (1, 0) for length, side in zip(size, extent)]
    return tuple(zip(*axes))


def axis_windows(length: int, extent: int, device: torch.device) -> AxisWindows:
    """Lay out the windows along an axis of ``length`` > ``extent`` tokens; the index tensors are made on ``device``."""
    count, stride = count_and_stride(length, extent)
    starts = (torch.arange(count, device=device) * stride).clamp(max=length - extent)
    gather = (starts[:, None] + torch.arange(extent, device=device)).flatten()
    token = torch.arange(length, device=device)
    # Window i < n - 1 starts at i * stride; only the last one may have been moved back.
    first = (torch.div(token - extent, stride, rounding_mode='floor') + 1).clamp(0, count - 1)
    last = torch.where(token >= length - extent, count - 1, torch.div(token, stride, rounding_mode='floor'))
    return AxisWindows(count, gather, *(window * extent + token - starts[window] for window in (first, last)))


def run_in_windows(function: Callable[[Tensor], Tensor], x: Tensor, extent: tuple[int, int]) -> Tensor:
    """Apply a function of fixed-size maps to a map of any size: all windows in one call, overlaps averaged.

    Args:
        function: Takes (M, C, *extent), gives (M, C', *extent).
        x: (N, C, H, W).
        extent: Height and width of a window, in tokens.

    Returns:
        (N, C', H, W). With (H, W) equal to ``extent`` this is ``function(x)``.
    """
    # torch.jit.trace gives sizes as tensors.
    size = tuple(map(int, x.shape[2:])) if torch.jit.is_tracing() else tuple(x.shape[2:])
    if size == tuple(extent):
        return function(x)
    pad = [max(side - length, 0) for length, side in zip(size, extent)]
    if any(pad):
        x = F.pad(x, (0, pad[1], 0, pad[0]))
    if native.fits(x) and any(length > side for length, side in zip(size, extent)):
        return _run_in_windows(function, x, extent)[:, :, : size[0], : size[1]]
    axes = [axis_windows(length, side, x.device) if length > side else None for length, side in zip(size, extent)]
    x = _merge(function(_split(x, axes, extent)), axes, x.shape[0])
    return x[:, :, : size[0], : size[1]]


def _run_in_windows(function: Callable[[Tensor], Tensor], x: Tensor, extent: tuple[int, int]) -> Tensor:
    """The same with the compiled operators, of maps no smaller than a window."""
    size = x.shape[2:]
    counts, strides = counts_and_strides(size, extent)
    windows = native.SplitWindows.apply(x, extent, counts, strides)
    return native.MergeWindows.apply(function(windows), size, counts, strides)


def _counts(axes) -> tuple[int, int]:
    return tuple(1 if axis is None else axis.count for axis in axes)


def _split(x: Tensor, axes, extent: tuple[int, int]) -> Tensor:
    """Cut (N, C, H, W) into (N * rows * columns, C, *extent)."""
    for dim, axis in zip((2, 3), axes):
        if axis is not None:
            x = x.index_select(dim, axis.gather)
    rows, columns = _counts(axes)
    x = x.unflatten(3, (columns, extent[1])).unflatten(2, (rows, extent[0]))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _merge(x: Tensor, axes, batch: int) -> Tensor:
    """Put windows back into a map; a token in two windows of an axis is their mean."""
    x = x.unflatten(0, (batch, *_counts(axes)))
    x = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    for dim, axis in zip((2, 3), axes):
        if axis is not None:
            x = (x.index_select(dim, axis.first) + x.index_select(dim, axis.last)) * 0.5
    return x
