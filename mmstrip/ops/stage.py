"""The fused stage: a stage of the deploy form as one operator."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..models import stock
from ..models.stock import is_untouched
from ..models.strip_mixing import BRANCHES
from ..models.strip_mlp import Stage
from ..models.windows import counts_and_strides
from .channel_mlp import FastChannelMixingBlock
from .fast import Fast, Snapshot, Types
from .local_strips import FastLocalStripMixing
from .residual import FastStripMLPBlock
from .strip_mixing import FastCascadeGroupStripMixing, FastStripMixingBlock


class FastStage(Fast, Stage):
    reference = Stage

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        packed = self._pack(x) if self.deploy and not valid else None
        return super().forward(x, **valid) if packed is None else packed.run(x)

    def _pack(self, x: Tensor) -> 'PackedStage | None':
        """The packed stage if it can run on (N, C, H, W), packed on first use and after any change; else None."""
        types = self.parameter_types(x)
        if not types:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(value.requires_grad for value in self.parameters())):
            return None
        packed = _packed.get(self)
        if packed is None or packed.dtype is not x.dtype or not packed.is_current(self, types):
            packed = _packed[self] = PackedStage(self, types, x.dtype)
        return packed if packed.takes(x) else None


class PackedStage(Snapshot):
    """A stage in the deploy form as one operator with packed weights, a second copy in memory.

    ``operator`` is None if a block is not stock, so that blocks must be called.
    """

    def __init__(self, stage: FastStage, types: Types, dtype: torch.dtype):
        super().__init__(stage, types)
        self.dtype, self.operator = dtype, None
        blocks = list(stage)  # including blocks that occur twice
        if not (self.is_stock and blocks and all(_is_packable(block, types) for block in blocks)):
            return
        self.extent, *others = {block.strip_mixing.branches['cgsmm'].extent for block in blocks}
        if not others:
            self.packed = [_tensors(block) for block in blocks]
            self.operator = torch.classes.mmstrip.Stage(self.packed, [_eps(block) for block in blocks], dtype)
            self.tensors = []  # the operator compares them itself

    def layers_of(self, stage: FastStage) -> list[nn.Module]:
        return list(stage.modules())[1:]

    def is_current(self, stage: FastStage, types: Types) -> bool:
        """Whether nothing has changed, including values."""
        return super().is_current(stage, types) and (self.operator is None or self.operator.is_current(self.packed))

    def takes(self, x: Tensor) -> bool:
        """Whether it runs on a map (N, C, H, W): no smaller than a window."""
        return self.operator is not None and all(length >= side for length, side in zip(x.shape[2:], self.extent))

    def run(self, x: Tensor) -> Tensor:
        return self.operator.run(x, *counts_and_strides(tuple(x.shape[2:]), self.extent))


_packed: WeakKeyDictionary[nn.Module, PackedStage] = WeakKeyDictionary()


def forget_packed(stage: nn.Module) -> None:
    """Make a stage pack its weights again in its next forward."""
    _packed.pop(stage, None)


def _is_packable(block: nn.Module, types: Types) -> bool:
    """Whether the operator computes the same as calling a block of the deploy form."""
    if not _is_stock(block, FastStripMLPBlock, types) or block.drop_path.training:
        return False
    strips, channels = block.strip_mixing, block.channel_mixing
    if not (_is_stock(strips, FastStripMixingBlock, types) and _is_stock(channels, FastChannelMixingBlock, types)):
        return False
    if tuple(strips.branches) != BRANCHES or not is_untouched(strips.branches) or strips.depthwise[0].training:
        return False
    cgsmm, lsmm = strips.branches.values()
    if not (_is_stock(cgsmm, FastCascadeGroupStripMixing, types) and _is_stock(lsmm, FastLocalStripMixing, types)):
        return False
    left_out = strips.project[1], cgsmm.norm, cgsmm.position_row, cgsmm.position_column, cgsmm.fuse_column
    folded = all(stock.identity.fits(layer) for layer in left_out) and channels.norm.weight is None
    maps = cgsmm.row.bias.dim() == cgsmm.column.bias.dim() == 3
    cascade = cgsmm.cascade and (cgsmm.row.axis, cgsmm.column.axis) == ('row', 'column')
    return cascade and folded and maps and channels.grn.beta is None and cgsmm.fuse_row.bias is not None


def _is_stock(module: nn.Module, fast: type[Fast], types: Types) -> bool:
    return is_untouched(module) and fast.find_mismatch(module, types) is None


def _tensors(block: nn.Module) -> list[Tensor]:
    """Tensors of a block in the operator's order; see csrc/stage.cpp."""
    strips, channels = block.strip_mixing, block.channel_mixing
    norm, _, depthwise = strips.depthwise
    project = strips.project[0]
    cgsmm, lsmm = strips.branches.values()
    narrow, _, broad = lsmm.reweight
    return [
        *(norm.weight, norm.bias, norm.running_mean, norm.running_var, depthwise.weight),
        *(project.weight, project.bias),
        *(cgsmm.row.weight, cgsmm.row.bias, cgsmm.fuse_row.weight, cgsmm.fuse_row.bias),
        *(cgsmm.column.weight, cgsmm.column.bias),
        *(lsmm.tall.weight, lsmm.wide.weight, narrow.weight, narrow.bias, broad.weight, broad.bias),
        strips.fuse.weight,
        *(channels.depthwise.weight, channels.fc1.weight, channels.fc1.bias, channels.grn.gamma),
        *(channels.fc2.weight, channels.fc2.bias),
    ]


def _eps(block: nn.Module) -> list[float]:
    channels = block.channel_mixing
    return [block.strip_mixing.depthwise[0].eps, channels.norm.eps, channels.grn.eps]
