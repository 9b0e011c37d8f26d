"""Where the images of a padded batch end: toolboxes normalise images, then pad them with zeros to one size."""

import torch
from torch import Tensor, nn

from ..ops.dispatch import is_ordinary, takes_valid

AVERAGING = ('strip_mixing', 'lsmm', 'channel_mixing', 'grn')  # parts of a block that average, or hold what does


def image_ends(images: Tensor) -> tuple[Tensor, Tensor] | None:
    """The pixels of each image: up to its last row, and up to its last column, that are not zero in all channels.

    Args:
        images: (N, C, H, W).

    Returns:
        Numbers of rows and of columns, (N, ) each; an image of zeros alone counts as a whole. None where no image is
        padded, if that can be told without waiting for a device or stopping a compiler.
    """
    filled = (images != 0).any(dim=1)
    # Lines up to the last that is filled: all, less those before the first from the end.
    ends = tuple(lines.shape[1] - lines.flip(1).int().argmax(1) for lines in (filled.any(dim=2), filled.any(dim=1)))
    can_tell = is_ordinary(images) and images.is_cpu
    if can_tell and all(bool((end == side).all()) for end, side in zip(ends, images.shape[2:])):
        return None
    return ends


def valid_tokens(ends: tuple[Tensor, Tensor] | None, x: Tensor, stride: int) -> Tensor | None:
    """Whether each token of a map (N, C, H, W) has a pixel of its image: (N, 1, H, W); None where all have one."""
    if ends is None:
        return None
    rows, columns = (
        torch.arange(count, device=x.device) * stride < end[:, None] for count, end in zip(x.shape[2:], ends)
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def check_averages(stages: nn.ModuleList) -> None:
    """Raise a TypeError for a module of one's own that cannot leave padding out."""
    for name, module in stages.named_modules():
        of_stage = name.count('.') < 2 and name != ''  # a stage or a block
        if (of_stage or name.rpartition('.')[2] in AVERAGING) and not takes_valid(type(module).forward):
            raise TypeError(
                f'ignore_padding needs modules whose forward takes the keyword valid, the tokens that averages run '
                f'over, but stages.{name} is a {type(module).__name__} without it'
            )
