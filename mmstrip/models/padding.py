"""Where the images of a padded batch end; toolboxes normalize images, then pad them with zeros to one size."""

import inspect

import torch
from torch import Tensor, nn

# Parts of a block that average, and the modules that hold them.
AVERAGING = ('strip_mixing', 'lsmm', 'channel_mixing', 'grn')


def image_ends(images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Height and width of each image (N, C, H, W) without its padding: to its last row and column with a nonzero pixel.

    Returns:
        Heights and widths, (N, ) each; an image of zeros counts as unpadded. None if no image is padded and that is
        known without a device synchronization or a graph break.
    """
    filled = (images != 0).any(dim=1)
    # The length minus the number of empty lines at the end.
    ends = tuple(lines.shape[1] - lines.flip(1).int().argmax(1) for lines in (filled.any(dim=2), filled.any(dim=1)))
    return None if _are_whole(images, ends) else ends


def _are_whole(images: Tensor, ends: tuple[Tensor, Tensor]) -> bool:
    if not images.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return all(bool((end == side).all()) for end, side in zip(ends, images.shape[2:]))
    except RuntimeError:  # from vmap and fake tensors, which have no values
        return False


def valid_tokens(ends: tuple[Tensor, Tensor] | None, x: Tensor, stride: int) -> dict[str, Tensor]:
    """The keyword argument ``valid`` of modules: a mask (N, 1, H, W) of the tokens of a map (N, C, H, W) that contain
    a pixel of their image; no argument without padding."""
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
    dtype = torch.promote_types(x.dtype, torch.float32)  # sums may overflow half precision
    sums = torch.where(valid, x, 0).sum(dim=(2, 3), keepdim=True, dtype=dtype)
    return (sums / valid.sum(dim=(2, 3), keepdim=True)).to(x.dtype)


def check_averages(stages: nn.ModuleList) -> None:
    """Raise TypeError for a replaced module that does not take ``valid``."""
    for name, module in stages.named_modules():
        of_stage = name.count('.') < 2 and name != ''  # a stage or a block
        averages = of_stage or name.rpartition('.')[2] in AVERAGING
        if averages and 'valid' not in inspect.signature(type(module).forward).parameters:
            raise TypeError(
                f'ignore_padding=True passes the keyword argument valid (a mask of tokens), but the forward of '
                f'stages.{name} ({type(module).__name__}) does not take it'
            )
