"""Strip mixing on channel-major maps."""

import torch
from torch import Tensor

from ...models import stock
from ...models.strip_mixing import CascadeGroupStripMixing, StripMixingBlock
from ...models.windows import run_in_windows
from .compiled import Compiled, batch_norm, channel_major, linear
from .depthwise import depthwise
from .strips import strips


class CompiledCascadeGroupStripMixing(Compiled, CascadeGroupStripMixing):
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

    def forward(self, u: Tensor) -> Tensor:
        if not self.may_run(u):
            return super().forward(u)
        mixed = channel_major(run_in_windows(self.mix_window, u, self.extent))
        maps = [channel_major(u), mixed] if self.cascade else [mixed]
        return linear(self.fuse_column.weight.flatten(1), torch.cat(maps)).transpose(0, 1)

    def mix_window(self, u: Tensor) -> Tensor:
        if not self.may_run(u):
            return super().mix_window(u)
        u = channel_major(u)
        r = strips(u, self.row.weight, self.row.bias, self.position_row.expand(), True)
        v = self.act(batch_norm(self.norm, linear(self.fuse_row.weight.flatten(1), torch.cat([r, u]))))
        start = v if self.cascade else u
        c = strips(start, self.column.weight, self.column.bias, self.position_column.expand(), False)
        return (c if self.cascade else torch.cat([v, c])).transpose(0, 1)


class CompiledStripMixingBlock(Compiled, StripMixingBlock):
    reference = StripMixingBlock
    layers = dict(
        depthwise=stock.sequence(stock.batch_norm, stock.gelu, stock.depthwise(3, 3)),
        project=stock.sequence(stock.pointwise(bias=True), stock.batch_norm, stock.gelu),
        fuse=stock.pointwise(bias=False),
    )

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        if not self.may_run(x):
            return super().forward(x, **valid)
        norm, act, conv = self.depthwise
        x = depthwise(act(batch_norm(norm, channel_major(x))), conv.weight)
        conv, norm, act = self.project
        x = act(batch_norm(norm, linear(conv.weight.flatten(1), x, conv.bias)))
        parts = [part.transpose(0, 1) for part in x.chunk(len(self.branches))]
        mixed = torch.cat([channel_major(part) for part in self.mix(parts, **valid)])
        return linear(self.fuse.weight.flatten(1), mixed).transpose(0, 1)
