"""Boxes and masks of exported detectors, in the pixels of a picture."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

_IGNORED = 0.02  # of the boxes, whose scores or overlaps are so near to a threshold that rounding decides
_MASK_PIXELS = 0.01  # of the picture's, in which masks may differ for the same reason


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

    Each detection is compared with the nearest of its class among the other's; it is 1 or more where there is none.

    Args:
        found, expected: See :func:`detections_of`.
        side: The picture's larger side, pixels.

    Returns:
        None if neither has found anything.
    """
    some, others = (
        np.column_stack([part['bboxes'] / side, part['scores'], part['labels']]) for part in (found, expected)
    )
    if not len(some) or not len(others):
        return None if len(some) == len(others) else np.inf
    apart = np.abs(some[:, None] - others).max(2)  # 1 or more where the classes differ
    if 'masks' in found:
        for row, mask in zip(apart, found['masks']):
            alike = np.flatnonzero(row < 1)
            differing = (mask != expected['masks'][alike]).mean((1, 2))
            row[alike[differing > _MASK_PIXELS]] = np.inf
    errors = np.sort([*apart.min(0), *apart.min(1)])
    return float(errors[len(errors) - int(_IGNORED * len(errors)) - 1])


def values_of(instances) -> dict:
    """The same of mmdet's InstanceData."""
    names = ('bboxes', 'scores', 'labels', 'masks')
    return {name: np.asarray(getattr(instances, name)) for name in names if name in instances}
