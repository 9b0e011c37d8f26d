"""Windows (:mod:`mmstrip.models.windows`) from tables of tokens, so that one compiled graph serves all map sizes.

A compiler would spend minutes on formulas of the map's size and make a graph for each case.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import windows


class _Given:
    tables = None  # of the map that is being compiled, or None


given = _Given()


@lru_cache(maxsize=4096)
def tables_of(axis: int, length: int, extent: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of an axis: tokens of its windows (count, extent), and the positions of each token's first and last copy.

    All tables are distinct tensors, as a graph would rely on identity.
    """
    with torch.inference_mode(False):
        if length <= extent:
            tokens, first, last = (torch.arange(count, device=device) for count in (extent, length, length))
            return tokens[None], first, last
        count, stride = windows.count_and_stride(length, extent)
        starts = windows.starts_of(length, extent, count, stride, device)
        copies = windows.copies_of(length, extent, count, stride, device)
        return starts[:, None] + torch.arange(extent, device=device), *copies


def run_in_windows(function: Callable[[Tensor], Tensor], x: Tensor, extent: tuple[int, int]) -> Tensor:
    """:func:`mmstrip.models.windows.run_in_windows`, with the given tables if there are any."""
    if given.tables is None:
        return windows.run_in_windows(function, x, extent)
    (rows, *row_copies), (columns, *column_copies) = given.tables
    height, width = (torch.sym_max(length, side) - length for length, side in zip(x.shape[2:], extent))
    x = F.pad(x, (0, width, 0, height)).index_select(2, rows.flatten()).index_select(3, columns.flatten())
    x = x.unflatten(3, columns.shape).unflatten(2, rows.shape).permute(0, 2, 4, 1, 3, 5)
    layout = x.shape[:3]
    x = function(x.flatten(0, 2)).unflatten(0, layout).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    for dim, (first, last) in ((2, row_copies), (3, column_copies)):
        x = (x.index_select(dim, first) + x.index_select(dim, last)) * 0.5
    return x
