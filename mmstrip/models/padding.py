"""Where the images of a padded batch end: toolboxes normalise images, then pad them with zeros to one size."""

import inspect

import torch
from torch import Tensor, nn

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
    return None if _are_whole(images, ends) else ends


def _are_whole(images: Tensor, ends: tuple[Tensor, Tensor]) -> bool:
    if not images.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return all(bool((end == side).all()) for end, side in zip(ends, images.shape[2:]))
    except RuntimeError:  # of vmap and fake tensors, which know no values
        return False


def valid_tokens(ends: tuple[Tensor, Tensor] | None, x: Tensor, stride: int) -> dict[str, Tensor]:
    """Which tokens of a map (N, C, H, W) have a pixel of their image: (N, 1, H, W), as the keyword ``valid``, which
    modules are called with; no keyword where all have one."""
    if ends is None:
        return {}
    rows, columns = (
        torch.arange(count, device=x.device) * stride < end[:, None] for count, end in zip(x.shape[2:], ends)
    )
    return dict(valid=(rows[:, :, None] & columns[:, None, :])[:, None])


def token_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average of (N, C, H, W) over the tokens that are ``valid`` (N, 1, H, W), or over all: (N, C, 1, 1)."""
    if valid is None:
        return x.mean(dim=(2, 3), keepdim=True)
    dtype = torch.promote_types(x.dtype, torch.float32)  # sums may be too large for half precision
    sums = torch.where(valid, x, 0).sum(dim=(2, 3), keepdim=True, dtype=dtype)
    return (sums / valid.sum(dim=(2, 3), keepdim=True)).to(x.dtype)


def check_averages(stages: nn.ModuleList) -> None:
    """Raise a TypeError for a module of one's own that cannot leave padding out."""
    for name, module in stages.named_modules():
        of_stage = name.count('.') < 2 and name != ''  # a stage or a block
        averages = of_stage or name.rpartition('.')[2] in AVERAGING
        if averages and 'valid' not in inspect.signature(type(module).forward).parameters:
            raise TypeError(
                f'ignore_padding needs modules whose forward takes the keyword valid, the tokens that averages run '
                f'over, but stages.{name} is a {type(module).__name__} without it'
            )
