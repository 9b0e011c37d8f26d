"""CGSMM and the Strip Mixing Block, composed of several operators."""

import torch
from torch import Tensor, nn

from ..models import stock
from ..models.strip_mixing import CascadeGroupStripMixing, StripMixingBlock
from ..models.windows import run_in_windows
from .context import are_plain
from .depthwise import norm_gelu_depthwise
from .fast import Fast
from .pointwise import pointwise, pointwise_norm_gelu
from .strip_layer import strip_layer
from .windows import merge_windows, split_windows


class FastCascadeGroupStripMixing(Fast, CascadeGroupStripMixing):
    reference = CascadeGroupStripMixing
    layers = dict(
        position_row=(stock.position, stock.identity),
        row=stock.strip_layer,
        fuse_row=stock.pointwise(bias=None),
        norm=(stock.batch_norm, stock.identity),
        act=stock.gelu,
        position_column=(stock.position, stock.identity),
        column=stock.strip_layer,
        fuse_column=(stock.pointwise(bias=False), stock.identity),
    )

    def forward(self, u: Tensor) -> Tensor:
        if not self.may_run(u):
            return super().forward(u)
        mixed = run_in_windows(self._mix_window, u, self.extent, split_windows, merge_windows)
        maps = (u, mixed) if self.cascade else (mixed,)
        if isinstance(self.fuse_column, nn.Identity):
            return torch.cat(maps, dim=1)
        return pointwise(maps, self.fuse_column.weight)

    def _mix_window(self, u: Tensor) -> Tensor:
        r = strip_layer(u, self.row, _expand(self.position_row))
        (v,) = pointwise_norm_gelu((r, u), self.fuse_row, self.norm)
        c = strip_layer(v if self.cascade else u, self.column, _expand(self.position_column))
        return c if self.cascade else torch.cat([v, c], dim=1)


def _expand(position: nn.Module) -> Tensor | None:
    """The embedding (C, H, W); None in the deploy form, where it is part of the strip layers' biases."""
    return None if isinstance(position, nn.Identity) else position.expand()


class FastStripMixingBlock(Fast, StripMixingBlock):
    reference = StripMixingBlock
    layers = dict(
        depthwise=stock.sequence(stock.batch_norm, stock.gelu, stock.depthwise(3, 3)),
        project=stock.sequence(stock.pointwise(bias=True), (stock.batch_norm, stock.identity), stock.gelu),
        fuse=stock.pointwise(bias=False),
    )

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        if not self.may_run(x):
            return super().forward(x, **valid)
        norm, _, conv = self.depthwise
        x = norm_gelu_depthwise(x, norm, conv.weight)
        conv, norm, _ = self.project
        count = len(self.branches)
        even = conv.out_channels % count == 0  # otherwise the last part is smaller
        parts = pointwise_norm_gelu((x,), conv, norm, chunks=count if even else 1)
        mixed = self.mix(parts if even else parts[0].chunk(count, dim=1), **valid)
        if not are_plain(x, *mixed):  # from replaced branches
            return self.fuse(torch.cat(mixed, dim=1))
        return pointwise(mixed, self.fuse.weight)
