"""Strip mixing on channel-major maps."""

import torch
from torch import Tensor

from ...models import stock
from ...models.strip_mixing import CascadeGroupStripMixing, StripMixingBlock
from ..tables import run_in_windows
from .depthwise import depthwise
from .formula import Formula, channel_major, is_formula, linear
from .norm_gelu import norm_gelu
from .strips import strips


class FormulaCascadeGroupStripMixing(Formula, CascadeGroupStripMixing):
    reference = CascadeGroupStripMixing
    layers = dict(
        position_row=stock.position,
        row=stock.strip_layer,
        fuse_row=stock.pointwise(bias=False),
        norm=stock.batch_norm,
        act=stock.gelu,
        position_column=stock.position,
        column=stock.strip_layer,
        fuse_column=stock.pointwise(bias=False),
    )

    def run(self, u: Tensor, statistics: list) -> Tensor:
        if self.cascade and tuple(u.shape[2:]) == self.extent:  # one window
            mixed = strips(self.column, self._mix_rows(u, statistics), self.position_column, u, before=True)
            return linear(self.fuse_column.weight, mixed)

        def mix_window(windows: Tensor) -> Tensor:
            windows = channel_major(windows)
            v = self._mix_rows(windows, statistics)
            if self.cascade:
                return strips(self.column, v, self.position_column).transpose(0, 1)
            return strips(self.column, windows, self.position_column, v, before=True).transpose(0, 1)

        mixed = channel_major(run_in_windows(mix_window, u.transpose(0, 1), self.extent))
        return linear(self.fuse_column.weight, torch.cat([u, mixed]) if self.cascade else mixed)

    def _mix_rows(self, u: Tensor, statistics: list) -> Tensor:
        r = strips(self.row, u, self.position_row, u)
        return norm_gelu(self.norm, linear(self.fuse_row.weight, r), statistics)[0]


class FormulaStripMixingBlock(Formula, StripMixingBlock):
    reference = StripMixingBlock
    layers = dict(
        depthwise=stock.sequence(stock.batch_norm, stock.gelu, stock.depthwise(3, 3)),
        project=stock.sequence(stock.pointwise(bias=True), stock.batch_norm, stock.gelu),
        fuse=stock.pointwise(bias=False),
    )

    def run(self, x: Tensor, statistics: list) -> Tensor:
        return self.run_residual(x, statistics)[0]

    def run_residual(self, x: Tensor, statistics: list) -> tuple[Tensor, Tensor]:
        """The formula, and x itself for those who read it too."""
        norm, _, conv = self.depthwise
        y, x = norm_gelu(norm, x, statistics)
        y = depthwise(y, conv.weight)
        conv, norm, _ = self.project
        y = norm_gelu(norm, linear(conv.weight, y), statistics, conv.bias)[0]
        return linear(self.fuse.weight, self._mix(y.chunk(len(self.branches)), statistics)), x

    def _mix(self, parts: tuple[Tensor, ...], statistics: list) -> Tensor:
        """The branches, each on its part of the channels."""
        branches = list(self.branches.values())
        if list(self.branches) == ['cgsmm', 'lsmm'] and all(map(is_formula, branches)):
            cgsmm, lsmm = branches
            return lsmm.run(parts[1], statistics, cgsmm.run(parts[0], statistics))
        mixed = self.mix([part.transpose(0, 1) for part in parts])
        return torch.cat([channel_major(part) for part in mixed])
