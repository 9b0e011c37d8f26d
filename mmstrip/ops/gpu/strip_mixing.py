"""Formula of strip mixing on channel-major maps."""

import torch
from torch import Tensor

from ...models import stock
from ...models.strip_mixing import CascadeGroupStripMixing, StripMixingBlock
from ..tables import run_in_windows
from .depthwise import depthwise
from .formula import Weights, channel_major, is_stock, linear
from .local_strips import is_local_strips, mix_locally
from .norm_gelu import norm_gelu
from .strips import strips

LAYERS = dict(
    depthwise=stock.sequence(stock.batch_norm, stock.gelu, stock.depthwise(3, 3)),
    project=stock.sequence(stock.pointwise(bias=True), stock.batch_norm, stock.gelu),
    fuse=stock.pointwise(bias=False),
)
GROUP_LAYERS = dict(
    position_row=stock.position,
    row=stock.strip_layer,
    fuse_row=stock.pointwise(bias=False),
    norm=stock.batch_norm,
    act=stock.gelu,
    position_column=stock.position,
    column=stock.strip_layer,
    fuse_column=stock.pointwise(bias=False),
)


def is_strip_mixing(module: StripMixingBlock) -> bool:
    """Whether the formula computes what a module does: it has both branches, and all layers are stock."""
    if not is_stock(module, StripMixingBlock, LAYERS) or list(module.branches) != ['cgsmm', 'lsmm']:
        return False
    cgsmm, lsmm = module.branches.values()
    return is_stock(cgsmm, CascadeGroupStripMixing, GROUP_LAYERS) and is_local_strips(lsmm)


def strip_weights(module: StripMixingBlock) -> list[Tensor]:
    """Weights of the linear layers."""
    cgsmm = module.branches['cgsmm']
    return [layer.weight for layer in (module.project[0], cgsmm.fuse_row, cgsmm.fuse_column, module.fuse)]


def mix_strips(module: StripMixingBlock, x: Tensor, weights: list[Weights]) -> tuple[Tensor, Tensor]:
    """The formula on (C, N, H, W), and x for the residual; ``weights`` are the result of :func:`.narrow`."""
    project, fuse_row, fuse_column, fuse = weights
    y, x = norm_gelu(module.depthwise[0], x, keeps=True)
    y = linear(project, depthwise(y, module.depthwise[2].weight))
    y = norm_gelu(module.project[1], y, module.project[0].bias)
    half = y.shape[0] // 2  # slices, not chunks: compilers join their gradients in one pass
    mixed = _mix_groups(module.branches['cgsmm'], y[:half], fuse_row, fuse_column)
    return linear(fuse, mix_locally(module.branches['lsmm'], y[half:], mixed)), x


def _mix_groups(module: CascadeGroupStripMixing, u: Tensor, fuse_row: Weights, fuse_column: Weights) -> Tensor:
    if module.cascade and tuple(u.shape[2:]) == module.extent:  # one window
        v = _mix_rows(module, u, fuse_row)
        return linear(fuse_column, strips(module.column, v, module.position_column, u, before=True))

    def mix_window(windows: Tensor) -> Tensor:
        windows = channel_major(windows)
        v = _mix_rows(module, windows, fuse_row)
        if module.cascade:
            return strips(module.column, v, module.position_column).transpose(0, 1)
        return strips(module.column, windows, module.position_column, v, before=True).transpose(0, 1)

    mixed = channel_major(run_in_windows(mix_window, u.transpose(0, 1), module.extent))
    return linear(fuse_column, torch.cat([u, mixed]) if module.cascade else mixed)


def _mix_rows(module: CascadeGroupStripMixing, u: Tensor, fuse_row: Weights) -> Tensor:
    return norm_gelu(module.norm, linear(fuse_row, strips(module.row, u, module.position_row, u)))
