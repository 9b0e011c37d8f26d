"""Where the images of a padded batch end: toolboxes normalise images, then pad them with zeros to one size."""

import torch
from torch import Tensor

from ..ops.dispatch import is_ordinary


def image_ends(images: Tensor) -> tuple[Tensor, Tensor] | None:
    """The pixels of each image: up to its last row, and up to its last column, that are not zero in all channels.

    Args:
        images: (N, C, H, W).

    Returns:
        Numbers of rows and of columns, (N, ) each; an image of zeros alone counts as a whole. None where no image is
        padded, if that can be told without waiting for a device or stopping a compiler.
    """
    filled = (images != 0).any(dim=1)
    ends = _end(filled.any(dim=2)), _end(filled.any(dim=1))
    can_tell = is_ordinary(images) and images.is_cpu
    if can_tell and all(bool((end == side).all()) for end, side in zip(ends, images.shape[2:])):
        return None
    return ends


def _end(lines: Tensor) -> Tensor:
    count = lines.shape[1]
    last = (lines * torch.arange(1, count + 1, device=lines.device)).amax(dim=1)
    return torch.where(last == 0, count, last)


def valid_tokens(ends: tuple[Tensor, Tensor], x: Tensor, stride: int) -> Tensor:
    """1 for each token of a map (N, C, H, W) that has a pixel of its image, 0 for the others: (N, 1, H, W)."""
    rows, columns = (
        torch.arange(count, device=x.device) * stride < end[:, None] for count, end in zip(x.shape[2:], ends)
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None].to(x.dtype)
