"""What runs in place of the boxes of :mod:`mmstrip.models`: ``native`` and ``recompute`` of :func:`.dispatch.fused`.

Each function takes the box, reads the parameters of its layers and gives what its method gives. Boxes inside of a box
are called: they answer for themselves.
"""

import torch
from torch import Tensor, nn

from .channel_mlp import channel_mlp, gelu_response_norm_linear
from .depthwise import depthwise, norm_gelu_depthwise
from .dispatch import area_of, native_types
from .local_strips import local_strips
from .norm_gelu import norm_gelu
from .pointwise import pointwise, pointwise_norm_gelu
from .strip_layer import strip_layer


def strip_mlp_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return strip_layer(x, layer.weight, layer.bias, layer.axis)


def mix_window(cgsmm: nn.Module, u: Tensor) -> Tensor:
    row, column = cgsmm.row, cgsmm.column
    rows = strip_layer(u, row.weight, row.bias, row.axis, _positions(cgsmm.position_row))
    (v,) = pointwise_norm_gelu((rows, u), cgsmm.fuse_row, cgsmm.norm)
    source = v if cgsmm.cascade else u
    columns = strip_layer(source, column.weight, column.bias, column.axis, _positions(cgsmm.position_column))
    return columns if cgsmm.cascade else torch.cat([v, columns], dim=1)


def mix_window_recompute(cgsmm: nn.Module, u: Tensor) -> Tensor:
    rows = cgsmm.row(cgsmm.position_row(u))
    v = norm_gelu(cgsmm.fuse_row(torch.cat([rows, u], dim=1)), cgsmm.norm)
    columns = cgsmm.column(cgsmm.position_column(v if cgsmm.cascade else u))
    return columns if cgsmm.cascade else torch.cat([v, columns], dim=1)


def _positions(position: nn.Module) -> Tensor | None:
    """Positions that a layer adds, (C, H, W); None in the deploy form, where they are in the strip layers' biases."""
    return None if isinstance(position, nn.Identity) else position.expand()


def fuse(cgsmm: nn.Module, *maps: Tensor) -> Tensor:
    if isinstance(cgsmm.fuse_column, nn.Identity):
        return torch.cat(maps, dim=1)
    return pointwise(maps, cgsmm.fuse_column.weight)


def local_strip_mixing(lsmm: nn.Module, u: Tensor) -> Tensor:
    narrow, _, broad = lsmm.reweight
    return local_strips(u, lsmm.tall.weight, lsmm.wide.weight, narrow.weight, narrow.bias, broad.weight, broad.bias)


def mix_parts(block: nn.Module, parts: tuple[Tensor, ...], valid: Tensor | None) -> list[Tensor]:
    """The branches of a strip mixing block, each on its part of the channels."""
    area = {'lsmm': area_of(valid)}
    return [branch(part, **area.get(name, {})) for (name, branch), part in zip(block.branches.items(), parts)]


def strip_mixing(block: nn.Module, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
    norm, _, conv = block.depthwise
    x = norm_gelu_depthwise(x, norm, conv.weight)
    conv, norm, _ = block.project
    count = len(block.branches)
    even = conv.out_channels % count == 0  # else the last part is smaller
    parts = pointwise_norm_gelu((x,), conv, norm, chunks=count if even else 1)
    parts = parts if even else parts[0].chunk(count, dim=1)
    mixed = mix_parts(block, parts, valid)
    if not native_types(*mixed):  # a branch of one's own may give another dtype
        return block.fuse(torch.cat(mixed, dim=1))
    return pointwise(mixed, block.fuse.weight)


def strip_mixing_recompute(block: nn.Module, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
    norm, _, conv = block.depthwise
    x = conv(norm_gelu(x, norm))
    conv, norm, _ = block.project
    parts = norm_gelu(conv(x), norm).chunk(len(block.branches), dim=1)
    return block.fuse(torch.cat(mix_parts(block, parts, valid), dim=1))


def channel_mixing(block: nn.Module, x: Tensor) -> Tensor:
    return channel_mlp(depthwise(x, block.depthwise.weight), block.norm, block.fc1, block.grn, block.fc2)


def channel_mixing_recompute(block: nn.Module, x: Tensor) -> Tensor:
    x = block.fc1(block.norm(block.depthwise(x).permute(0, 2, 3, 1)))
    return gelu_response_norm_linear(x, block.grn, block.fc2).permute(0, 3, 1, 2)


def add_branch(block: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
    """Drop path and the residual in one pass: what drop path makes of a one for each image is 0 or 1 / (1 - rate)."""
    if not block.drop_path.training:
        return x + branch
    return torch.addcmul(x, branch, block.drop_path(branch.new_ones(len(branch), 1, 1, 1)))
