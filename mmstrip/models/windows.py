"""Overlapping windows: how strip weights of a fixed extent serve a map of any size.

The strip layers of a stage have a fixed extent (tokens per row and column). MLP-DINO (IJCAI 2024) runs them on other
sizes: it cuts the map into overlapping windows of that extent and averages where they overlap. Per axis, for a map of
``length`` tokens and windows of ``extent`` tokens:

- a length up to the extent is one window, zero-padded at its end and cropped afterwards;
- otherwise there are ``n = round(length / extent + 0.5)`` windows that overlap by
  ``o = round((n * extent - length) / (n - 1) - 0.5)`` tokens (both rounded half to even). Window i starts at
  ``i * (extent - o)``; one that would pass the end is moved back to end there.

Every token is covered by one or two windows per axis, and cost grows linearly with the number of tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)  # new in PyTorch 2.7
Pair = tuple[int, int]  # of the vertical and the horizontal axis


def count_and_stride(length: int, extent: int) -> tuple[int, int]:
    """Number of windows along an axis and the distance between their starts (integer arithmetic).

    Args:
        length: Tokens along the axis, more than ``extent``.
        extent: Tokens of a window.
    """
    # Without branches, so that one compiled graph serves all lengths.
    pairs, rest = length // (2 * extent), length % (2 * extent)
    count = 2 * pairs + (rest + 2 * extent - 1) // (2 * extent) + rest // extent
    overlap, rest = (count * extent - length) // (count - 1), (count * extent - length) % (count - 1)
    exact = 1 - (rest + count - 2) // (count - 1)
    return count, extent - overlap + exact * (overlap % 2)


def counts_and_strides(size: Pair, extent: Pair) -> tuple[Pair, Pair]:
    """Counts and strides of both axes for a map (H, W) no smaller than a window; a single window has stride 0."""
    axes = [count_and_stride(length, side) if length > side else (1, 0) for length, side in zip(size, extent)]
    return tuple(zip(*axes))


def split_windows(x: Tensor, extent: Pair, counts: Pair, strides: Pair) -> Tensor:
    """Cut (N, C, H, W), no smaller than a window, into (N * rows * columns, C, *extent)."""
    for dim, side, count, stride in zip((2, 3), extent, counts, strides):
        if x.shape[dim] > side:
            starts = starts_of(x.shape[dim], side, count, stride, x.device)
            x = x.index_select(dim, (starts[:, None] + torch.arange(side, device=x.device)).flatten())
    x = x.unflatten(3, (counts[1], extent[1])).unflatten(2, (counts[0], extent[0]))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def merge_windows(x: Tensor, size: Pair, counts: Pair, strides: Pair) -> Tensor:
    """Merge windows into a map (N, C, *size); a token in two windows of an axis is their mean."""
    extent = x.shape[2:]
    x = x.unflatten(0, (-1, *counts)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    for dim, length, side, count, stride in zip((2, 3), size, extent, counts, strides):
        if length > side:
            first, last = copies_of(length, side, count, stride, x.device)
            x = (x.index_select(dim, first) + x.index_select(dim, last)) * 0.5
    return x


def starts_of(length: int, extent: int, count: int, stride: int, device: torch.device) -> Tensor:
    """First tokens of the windows along an axis."""
    return (torch.arange(count, device=device) * stride).clamp(max=length - extent)


def copies_of(length: int, extent: int, count: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of each token in the first and the last window that covers it, among count * extent positions."""
    starts = starts_of(length, extent, count, stride, device)
    token = torch.arange(length, device=device)
    # Window i starts at i * stride; only the last one may have been moved back.
    first = (_floor(token - extent, stride) + 1).clamp(0, count - 1)
    last = torch.where(token >= length - extent, count - 1, _floor(token, stride))
    return tuple(window * extent + token - starts[window] for window in (first, last))


def run_in_windows(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    extent: tuple[int, int],
    split: Callable = split_windows,
    merge: Callable = merge_windows,
) -> Tensor:
    """Apply a function of fixed-size maps to a map of any size: all windows in one call, overlaps averaged.

    Args:
        function: Maps (M, C, *extent) to (M, C', *extent).
        x: (N, C, H, W).
        extent: Height and width of a window, in tokens.
        split, merge: Implementations of :func:`split_windows` and :func:`merge_windows`. Default to these.

    Returns:
        (N, C', H, W). With (H, W) equal to ``extent`` this is ``function(x)``.
    """
    # torch.jit.trace gives sizes as tensors.
    size = tuple(map(int, x.shape[2:])) if torch.jit.is_tracing() else tuple(x.shape[2:])
    if is_exporting() and any(isinstance(length, torch.SymInt) for length in size):
        return _run_in_any_windows(function, x, extent)
    if size == tuple(extent):
        return function(x)
    pad = [max(side - length, 0) for length, side in zip(size, extent)]
    if any(pad):
        x = F.pad(x, (0, pad[1], 0, pad[0]))
    if all(length <= side for length, side in zip(size, extent)):
        return function(x)[:, :, : size[0], : size[1]]
    padded = tuple(x.shape[2:])
    counts, strides = counts_and_strides(padded, extent)
    x = merge(function(split(x, extent, counts, strides)), padded, counts, strides)
    return x[:, :, : size[0], : size[1]]


def _run_in_any_windows(function: Callable[[Tensor], Tensor], x: Tensor, extent: tuple[int, int]) -> Tensor:
    """The same without branches, for an exported graph that serves all sizes; a single window is counted twice."""
    images, (height, width) = x.shape[0], x.shape[2:]
    padded = [torch.sym_max(length, side) for length, side in zip((height, width), extent)]
    x = F.pad(x, (0, padded[1] - width, 0, padded[0] - height))
    (rows, row_tokens, row_copies), (columns, column_tokens, column_copies) = (
        _any_layout(length, side, x.device) for length, side in zip(padded, extent)
    )
    x = x.index_select(2, row_tokens).index_select(3, column_tokens)
    x = x.reshape(images, -1, rows, extent[0], columns, extent[1]).permute(0, 2, 4, 1, 3, 5)
    x = function(x.reshape(images * rows * columns, -1, *extent))
    x = x.reshape(images, rows, columns, -1, *extent).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(images, -1, rows * extent[0], columns * extent[1])
    for dim, copies in ((2, row_copies), (3, column_copies)):
        x = (x.index_select(dim, copies[0]) + x.index_select(dim, copies[1])) * 0.5
    return x.narrow(2, 0, height).narrow(3, 0, width)


def _any_layout(length: int, extent: int, device: torch.device) -> tuple[int, Tensor, list[Tensor]]:
    """Number of windows along an axis, their tokens, and the positions of each token's first and last copy in these.

    Computed with tensors: the tracer then sees one unknown number instead of formulas of sizes, which it would compare
    for minutes.
    """
    tokens = torch.full((1,), length, dtype=torch.int64, device=device).squeeze(0)  # OpenVINO cannot fill scalars
    several = (tokens > extent).long()
    count, stride = count_and_stride(tokens + 1 - several, extent)  # a single window: that of two windows, minus one
    count = count - 1 + several
    windows = count.item()
    torch._check(windows >= 1)
    starts = torch.minimum(torch.arange(windows, device=device) * stride, tokens - extent)
    token = torch.arange(length, device=device)
    first = torch.minimum((_floor(token - extent, stride) + 1).clamp(min=0), count - 1)
    last = torch.where(token >= tokens - extent, count - 1, _floor(token, stride))
    copies = [window * extent + token - starts.index_select(0, window) for window in (first, last)]
    return windows, (starts[:, None] + torch.arange(extent, device=device)).flatten(), copies


def _floor(x: Tensor, divisor: Tensor | int) -> Tensor:
    return torch.div(x, divisor, rounding_mode='floor')
