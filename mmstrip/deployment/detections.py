"""Boxes and masks of exported detectors, in the pixels of a picture."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_IGNORED = 0.02  # of the boxes, whose scores or overlaps are so near to a threshold that rounding decides
_MASK_PIXELS = 0.01  # of a mask's, that may differ for the same reason


def detections_of(outputs: Sequence[np.ndarray], about: dict, inside: tuple, size: tuple) -> dict:
    """What an exported detector has found in a picture.

    Args:
        outputs: Of the file: boxes with scores (n, 5), labels (n, ) and, of detectors with masks, (n, h, w).
        about: What the file says of itself.
        inside: Height and width of the picture among the pixels that the file took.
        size: Height and width of the picture itself.

    Returns:
        ``bboxes`` (k, 4), x0, y0, x1, y1, ``scores`` (k,), the best first, ``labels`` (k,) and, of detectors with
        masks, ``masks`` (k, H, W), bool.
    """
    boxes, scores, labels = outputs[0][:, :4], outputs[0][:, 4], outputs[1].astype(np.int64)
    real = scores > 0
    limits = np.asarray([inside[1], inside[0]] * 2, np.float32)
    scale = np.asarray([size[1] / inside[1], size[0] / inside[0]] * 2, np.float32)
    boxes = np.clip(boxes[real], 0, limits) * scale
    found = dict(bboxes=boxes, scores=scores[real], labels=labels[real])
    if len(outputs) > 2:
        threshold = about['threshold']
        pasted = [_paste(mask, box, size) >= threshold for mask, box in zip(outputs[2][real], boxes)]
        found['masks'] = np.stack(pasted) if pasted else np.zeros((0, *size), bool)
    return found


def _paste(mask: np.ndarray, box: np.ndarray, size: tuple) -> np.ndarray:
    """A mask (h, w) at the place of its box in a picture (H, W), interpolated; 0 outside."""
    height, width = size
    x0, y0, x1, y1 = torch.from_numpy(box)
    columns = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    rows = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], -1)
    grid = torch.nan_to_num(grid, nan=2.0, posinf=2.0, neginf=-2.0)  # of a box without area
    return F.grid_sample(torch.from_numpy(mask)[None, None], grid[None], align_corners=False)[0, 0].numpy()


def disagreement(found: dict, expected: dict, side: int) -> float | None:
    """Largest difference of two networks' detections: of scores, and of sides relative to the picture's.

    Each detection is compared with the nearest of its class among the other's; it is infinite where there is none.

    Args:
        found, expected: See :func:`detections_of`.
        side: The picture's larger side, pixels.

    Returns:
        None if neither has found anything.
    """
    errors = sorted([*_nearest(found, expected, side), *_nearest(expected, found, side)])
    errors = errors[: len(errors) - int(_IGNORED * len(errors))]
    return errors[-1] if errors else None


def _nearest(some: dict, others: dict, side: int) -> list[float]:
    errors = []
    for i, label in enumerate(some['labels']):
        distances = [np.inf]
        for k in np.flatnonzero(others['labels'] == label):
            if 'masks' in some and not _same_mask(some['masks'][i], others['masks'][k]):
                continue
            apart = np.abs(some['bboxes'][i] - others['bboxes'][k]).max() / side
            distances.append(max(float(apart), abs(float(some['scores'][i] - others['scores'][k]))))
        errors.append(min(distances))
    return errors


def _same_mask(one: np.ndarray, other: np.ndarray) -> bool:
    return (one != other).sum() <= max(_MASK_PIXELS * one.size, 4)


def values_of(instances) -> dict:
    """The same of mmdet's InstanceData."""
    names = ('bboxes', 'scores', 'labels', 'masks')
    return {name: np.asarray(getattr(instances, name)) for name in names if name in instances}


def pictures_for(size: tuple, channels: int, pixels: bool) -> list[Tensor]:
    """Random spots of three sizes, (1, C, H, W), in which a detector finds more than in noise.

    Args:
        size: Height and width.
        channels: Of a picture.
        pixels: Values of 0 to 255 in uint8; else normalised ones.
    """
    pictures = []
    for seed, spot in enumerate((4, 8, 16)):
        generator = torch.Generator().manual_seed(seed)
        few = torch.randn(1, 1, *(max(side // spot, 2) for side in size), generator=generator)
        picture = 1.5 * F.interpolate(few, size, mode='bicubic').expand(1, channels, *size)
        pictures.append((128 + 64 * picture).clamp(0, 255).byte() if pixels else picture.contiguous())
    return pictures
