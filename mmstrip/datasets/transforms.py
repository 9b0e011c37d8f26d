"""Faster versions of mmpretrain's training transforms; each replaces the one of its name (``mmstrip.RandAugment``).

Random numbers are drawn in the same order, so equal seeds give equal crops, flips and operations. Pixels are equal too,
except after resizing, where they differ by up to 2 of 255. Images of other types or channels, and other arguments, are
left to mmpretrain.
"""

from itertools import accumulate

import cv2
import numpy as np
import torch
from mmcv import transforms as mmcv_transforms
from mmcv.transforms.utils import cache_randomness
from mmpretrain.datasets import transforms as mmpretrain_transforms
from torch.nn import functional as F

from ..registry import TRANSFORMS

_VALUES = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)  # an image with each value
_FLIPS = {'horizontal': 1, 'vertical': 0, 'diagonal': -1}


@TRANSFORMS.register_module()
class RandomResizedCrop(mmpretrain_transforms.RandomResizedCrop):
    """Crop and resize at random; ``backend='pillow'`` computes like Pillow, with PyTorch's kernels.

    They differ by rounding: by up to 2 of 255, in 0.3 % of the values.
    """

    def transform(self, results: dict) -> dict:
        img = results['img']
        if self.backend != 'pillow' or self.interpolation not in ('bilinear', 'bicubic') or not _is_8_bit(img):
            return super().transform(results)
        top, left, height, width = self.rand_crop_params(img)
        crop = np.array(img[top : top + height, left : left + width], order='C')
        batch = torch.from_numpy(crop).view(1, height, width, -1).permute(0, 3, 1, 2)
        batch = F.interpolate(batch, tuple(self.scale), mode=self.interpolation, antialias=True)
        results['img'] = batch.permute(0, 2, 3, 1).reshape(*self.scale, *img.shape[2:]).numpy()
        results['img_shape'] = results['img'].shape
        return results


@TRANSFORMS.register_module()
class RandomFlip(mmcv_transforms.RandomFlip):
    """Flip at random, without negative strides, which slow down each later copy of the image."""

    @cache_randomness
    def _choose_direction(self) -> str | None:
        directions = [self.direction] if isinstance(self.direction, str) else self.direction
        shares = self.prob if isinstance(self.prob, list) else [self.prob / len(directions)] * len(directions)
        drawn = np.random.random_sample()  # like np.random.choice, eight times as fast
        return next((name for name, end in zip(directions, accumulate(shares)) if drawn < end), None)

    def _flip(self, results: dict) -> None:
        img = results['img']
        super()._flip(results)
        if _is_8_bit(img):
            results['img'] = cv2.flip(img, _FLIPS[results['flip_direction']]).reshape(img.shape)


@TRANSFORMS.register_module()
class RandAugment(mmpretrain_transforms.RandAugment):
    """RandAugment with lookup tables for the operations that map pixel values."""

    @cache_randomness
    def random_policy_indices(self) -> list[int]:
        return np.random.randint(len(self.policies), size=self.num_policies).tolist()

    def transform(self, results: dict) -> dict | None:
        for index in self.random_policy_indices():
            operation, img = self.transforms[index], results['img']
            lookup = _LOOKUPS.get(type(operation))
            if lookup and _is_8_bit(img) and img.ndim == 3 and img.size < 2**24:  # counted exactly in float32
                results['img'] = lookup(operation, img)
            else:
                results = operation(results)
                if results is None:
                    return None
        return results


@TRANSFORMS.register_module()
class RandomErasing(mmpretrain_transforms.RandomErasing):
    """Erase a random rectangle, computing Gaussian noise in place."""

    def _fill_pixels(self, img: np.ndarray, top: int, left: int, h: int, w: int) -> np.ndarray:
        if self.mode == 'const' or self.fill_std is None:
            return super()._fill_pixels(img, top, left, h, w)
        noise = np.random.standard_normal((h, w, 3))
        noise *= self.fill_std
        noise += self.fill_color
        img[top : top + h, left : left + w] = noise.clip(0, 255, out=noise).astype(np.uint8)
        return img


def _is_8_bit(img: np.ndarray) -> bool:
    """Whether an image is 8-bit and of shape (H, W) or (H, W, 3)."""
    return img.dtype == np.uint8 and img.size > 0 and (img.ndim == 2 or img.shape[2:] == (3,))


def _pointwise(operation: mmcv_transforms.BaseTransform, img: np.ndarray) -> np.ndarray:
    """An operation that depends on a pixel's value only, through a table of its results."""
    table = operation.transform(dict(img=_VALUES))['img']
    return img if table is _VALUES else cv2.LUT(img, table)


def _auto_contrast(operation: mmpretrain_transforms.AutoContrast, img: np.ndarray) -> np.ndarray:
    if operation.random_disable():
        return img
    low, high = np.transpose([np.flatnonzero(counts)[[0, -1]] for counts in _histograms(img)])
    scale = 255.0 / np.maximum(high - low, 1)
    table = np.where(low < high, (_VALUES * scale - low * scale).clip(0, 255), _VALUES)
    return cv2.LUT(img, table.astype(np.uint8))


def _equalize(operation: mmpretrain_transforms.Equalize, img: np.ndarray) -> np.ndarray:
    if operation.random_disable():
        return img
    table = _VALUES.copy()
    for channel, counts in enumerate(_histograms(img)):
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step:
            below = counts.cumsum() - counts
            table[0, 1:, channel] = ((below[1:] + step // 2) // step).clip(max=255)
            table[0, 0, channel] = 0
    return cv2.LUT(img, table)


def _contrast(operation: mmpretrain_transforms.Contrast, img: np.ndarray) -> np.ndarray:
    if operation.random_disable():
        return img
    magnitude = operation.random_magnitude() if operation.magnitude is None else operation.magnitude
    factor = 1 + operation.random_negative(magnitude)
    mean = round(cv2.mean(cv2.cvtColor(img, cv2.COLOR_BGR2GRAY))[0])
    values = _VALUES.astype(np.float32)
    table = cv2.addWeighted(values, factor, np.full_like(values, mean), 1 - factor, 0)
    return cv2.LUT(img, table.clip(0, 255).astype(np.uint8))


def _histograms(img: np.ndarray) -> list[np.ndarray]:
    """Number of pixels of each value, per channel."""
    return [cv2.calcHist([img], [i], None, [256], [0, 256]).ravel().astype(int) for i in range(img.shape[2])]


_LOOKUPS = {
    mmpretrain_transforms.AutoContrast: _auto_contrast,
    mmpretrain_transforms.Brightness: _pointwise,
    mmpretrain_transforms.Contrast: _contrast,
    mmpretrain_transforms.Equalize: _equalize,
    mmpretrain_transforms.Solarize: _pointwise,
    mmpretrain_transforms.SolarizeAdd: _pointwise,
}
