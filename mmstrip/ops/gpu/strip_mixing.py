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

    def run(self, u: Tensor) -> Tensor:
        if self.cascade and tuple(u.shape[2:]) == self.extent:  # one window
            mixed = strips(self.column, self._mix_rows(u), self.position_column, u, before=True)
            return linear(self.fuse_column.weight, mixed)

        def mix_window(windows: Tensor) -> Tensor:
            windows = channel_major(windows)
            v = self._mix_rows(windows)
            if self.cascade:
                return strips(self.column, v, self.position_column).transpose(0, 1)
            return strips(self.column, windows, self.position_column, v, before=True).transpose(0, 1)

        mixed = channel_major(run_in_windows(mix_window, u.transpose(0, 1), self.extent))
        return linear(self.fuse_column.weight, torch.cat([u, mixed]) if self.cascade else mixed)

    def _mix_rows(self, u: Tensor) -> Tensor:
        r = strips(self.row, u, self.position_row, u)
        return norm_gelu(self.norm, linear(self.fuse_row.weight, r))


class FormulaStripMixingBlock(Formula, StripMixingBlock):
    reference = StripMixingBlock
    layers = dict(
        depthwise=stock.sequence(stock.batch_norm, stock.gelu, stock.depthwise(3, 3)),
        project=stock.sequence(stock.pointwise(bias=True), stock.batch_norm, stock.gelu),
        fuse=stock.pointwise(bias=False),
    )

    def run(self, x: Tensor) -> Tensor:
        return self._mix_normed(norm_gelu(self.depthwise[0], x))

    def run_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The formula, and x itself for those who read it too."""
        y, x = norm_gelu(self.depthwise[0], x, keeps=True)
        return self._mix_normed(y), x

    def _mix_normed(self, x: Tensor) -> Tensor:
        conv, norm, _ = self.project
        x = linear(conv.weight, depthwise(x, self.depthwise[2].weight))
        x = norm_gelu(norm, x, conv.bias)
        return linear(self.fuse.weight, self._mix(x.chunk(len(self.branches))))

    def _mix(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The branches, each on its part of the channels."""
        branches = list(self.branches.values())
        if list(self.branches) == ['cgsmm', 'lsmm'] and all(map(is_formula, branches)):
            cgsmm, lsmm = branches
            return lsmm.run(parts[1], cgsmm.run(parts[0]))
        mixed = self.mix([part.transpose(0, 1) for part in parts])
        return torch.cat([channel_major(part) for part in mixed])
