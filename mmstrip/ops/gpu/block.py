"""Formulas of a block and of the steps between stages, for compiled graphs."""

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from ...models.strip_mlp import StripMLPBlock
from .channel_mixing import channel_weights, is_channel_mixing, mix_channels
from .formula import channel_major, compute_type, is_called, linear, narrow
from .strip_mixing import is_strip_mixing, mix_strips, strip_weights


def block_forward(block: StripMLPBlock, x: Tensor, **valid: Tensor) -> Tensor:
    """Compute ``StripMLPBlock.forward`` on channel-major maps throughout.

    A block whose layers are not those that the network was built with runs ``StripMLPBlock.forward`` itself.
    """
    if valid or not has_formula(block, x):
        return StripMLPBlock.forward(block, x, **valid)
    dtype = compute_type(x)
    with torch.autocast(x.device.type, enabled=False):
        return _mix(block, channel_major(x), dtype).transpose(0, 1)


def has_formula(block: StripMLPBlock, x: Tensor) -> bool:
    """Whether the formula stands for a block: all its layers are those that the network was built with."""
    drop_path = block.drop_path
    if type(drop_path) is not DropPath or not is_called(drop_path) or x.numel() <= x.shape[1]:
        return False
    return is_strip_mixing(block.strip_mixing) and is_channel_mixing(block.channel_mixing)


def _mix(block: StripMLPBlock, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula on (C, N, H, W), with matrix products in ``dtype``."""
    kept = _draw(block.drop_path, x)
    first = strip_weights(block.strip_mixing)
    weights = narrow([*first, *channel_weights(block.channel_mixing)], dtype)
    y, same = mix_strips(block.strip_mixing, x.to(dtype), weights[: len(first)])
    x = _add(same if x.dtype == dtype else x, y, kept, 0)
    y = mix_channels(block.channel_mixing, x.to(dtype), weights[len(first) :])
    return _add(x, y, kept, 1)


def _draw(drop_path: DropPath, x: Tensor) -> Tensor | None:
    """Factors of drop path for the images of both branches, (2, N, 1, 1), drawn in one call; None if it is off."""
    if not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    draw = torch.rand((2, x.shape[1], 1, 1), device=x.device)
    return (draw < keep).to(draw.dtype) / keep


def _add(x: Tensor, y: Tensor, kept: Tensor | None, branch: int) -> Tensor:
    return x + y if kept is None else (x + y * kept[branch]).to(x.dtype)


def merge_maps(merging: nn.Module, cross_stage: nn.ModuleList, x: Tensor, earlier: list[Tensor]):
    """Compute ``mmstrip.models.strip_mlp.merge_maps`` without convolutions.

    Args:
        merging: Convolution of s x s tokens with stride s, computed as a matrix product.
        cross_stage: Depthwise convolutions of 2 x 2 tokens, computed as multiplications and additions.
        x: A map, or images.
        earlier: Maps of the same height and width.
    """
    if not _is_patches(merging) or merging.groups != 1 or merging.bias is not None:
        merged = merging(x)
    else:
        dtype, side = compute_type(x), merging.stride[0]
        patches = _patches(x, side).to(dtype).flatten(1, 3)  # (N, C * s * s, H / s, W / s)
        (weights,) = narrow([merging.weight], dtype)
        merged = linear(weights, channel_major(patches)).transpose(0, 1)
    earlier = [_cross_stage(conv, feature) for conv, feature in zip(cross_stage, earlier)]
    return sum(earlier, merged), [*earlier, merged]


def _cross_stage(conv: nn.Module, x: Tensor) -> Tensor:
    if not _is_patches(conv) or conv.groups != conv.in_channels or conv.bias is not None:
        return conv(x)
    patches = _patches(x, conv.stride[0])[:, :, None]  # (N, C, 1, s, s, H / s, W / s)
    weight = conv.weight.unflatten(0, (x.shape[1], -1)).flatten(2, 3)[..., None, None]  # (C, O, s, s, 1, 1)
    return (patches * weight).sum((3, 4)).flatten(1, 2).to(compute_type(x))


def _is_patches(conv: nn.Module) -> bool:
    """Whether a layer is a convolution of adjacent patches: its stride is its kernel size."""
    if type(conv) is not nn.Conv2d or not is_called(conv):
        return False
    height, width = conv.kernel_size
    return height == width and conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.dilation == (1, 1)


def _patches(x: Tensor, side: int) -> Tensor:
    """(N, C, H, W) as (N, C, side, side, H / side, W / side)."""
    height, width = x.shape[2] // side, x.shape[3] // side
    x = x[:, :, : height * side, : width * side]
    return x.unflatten(3, (width, side)).unflatten(2, (height, side)).permute(0, 1, 3, 5, 2, 4)
