"""Boxes and masks of exported detectors, in pixels of the original image."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import BaseDataElement

_IGNORED = 0.02  # fraction of boxes with scores or overlaps so close to a threshold that rounding decides
_MASK_PIXELS = 0.01  # fraction of pixels in which masks may differ for the same reason


def detections_of(outputs: Sequence[np.ndarray], about: dict, inside: tuple, size: tuple) -> dict:
    """Detections of an exported detector in an image.

    Args:
        outputs: Outputs of the file: boxes with scores (n, 5), labels (n, ) and, with masks, (n, h, w).
        about: Description of the file.
        inside: Height and width of the resized image, without padding.
        size: Height and width of the original image.

    Returns:
        ``bboxes`` (k, 4), x0, y0, x1, y1, ``scores`` (k,), best first, ``labels`` (k,) and, with
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
    """A mask (h, w) resized into its box in an image (H, W); 0 outside."""
    height, width = size
    x0, y0, x1, y1 = torch.from_numpy(box)
    columns = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    rows = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], -1)
    grid = torch.nan_to_num(grid, nan=2.0, posinf=2.0, neginf=-2.0)  # boxes without area
    return F.grid_sample(torch.from_numpy(mask)[None, None], grid[None], align_corners=False)[0, 0].numpy()


def disagreement(found: dict, expected: dict, side: int) -> float | None:
    """Largest difference of scores and coordinates of two networks' detections (see :func:`detections_of`).

    Coordinates are relative to ``side``, the image's longer side in pixels. Each detection is compared with the nearest
    one of its class; the difference is 1 or more if there is none. None if neither network has found anything.
    """
    some, others = (
        np.column_stack([part['bboxes'] / side, part['scores'], part['labels']]) for part in (found, expected)
    )
    if not len(some) or not len(others):
        return None if len(some) == len(others) else np.inf
    apart = np.abs(some[:, None] - others).max(2)  # 1 or more if classes differ
    if 'masks' in found:
        for row, mask in zip(apart, found['masks']):
            alike = np.flatnonzero(row < 1)
            differing = (mask != expected['masks'][alike]).mean((1, 2))
            row[alike[differing > _MASK_PIXELS]] = np.inf
    errors = np.sort([*apart.min(0), *apart.min(1)])
    return float(errors[len(errors) - int(_IGNORED * len(errors)) - 1])


def values_of(instances: BaseDataElement) -> dict[str, np.ndarray]:
    """Detections as :func:`detections_of` returns them, from mmdet's InstanceData."""
    names = ('bboxes', 'scores', 'labels', 'masks')
    return {name: np.asarray(getattr(instances, name)) for name in names if name in instances}
