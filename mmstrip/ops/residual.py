"""Residuals with stochastic depth in one pass."""

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from ..models.stock import Stock
from ..models.strip_mlp import StripMLPBlock
from .context import are_plain, is_ordinary
from .fast import Fast, Types


class FastStripMLPBlock(Fast, StripMLPBlock):
    reference = StripMLPBlock
    layers = dict(drop_path=Stock(DropPath))

    @staticmethod
    def parameter_types(x: Tensor) -> Types:
        return (x.dtype,) if is_ordinary() and are_plain(x) else ()  # no operators needed

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        if not self.may_run(x):
            return super().forward(x, **valid)
        x = add_branch(x, self.strip_mixing(x, **valid), self.drop_path)
        return add_branch(x, self.channel_mixing(x, **valid), self.drop_path)


def add_branch(x: Tensor, branch: Tensor, drop_path: DropPath) -> Tensor:
    """x + drop_path(branch) in one pass; drop path of ones is the factor per image: 0 or 1 / (1 - rate)."""
    if not drop_path.training:
        return x + branch
    return torch.addcmul(x, branch, drop_path(branch.new_ones(len(branch), 1, 1, 1)))
