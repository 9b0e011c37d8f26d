"""Scenes of real handwritten digits for detection, instance and semantic segmentation, made in seconds."""

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from rich.console import Console
from rich.progress import track

from ..registry import TRANSFORMS
from .digit_split import DIGITS, split_digits

# Sides of the digits in pixels, how much brighter than the background they are (gray levels), and digits per scene of
# 96 x 96 pixels.
SIDES = (10, 60)
CONTRASTS = (50, 150)
COUNTS = (3, 6)
# A digit's pixels have at least this much ink; other digits may hide at most MAX_HIDDEN of them.
INK = 0.4
MAX_HIDDEN = 0.4
ATTEMPTS = 20


class PlacedDigit(NamedTuple):
    """A digit in a scene."""

    label: int
    index: int  # in scikit-learn's data
    area: int  # pixels, visible or hidden
    mask: np.ndarray  # (H, W), True where the digit is visible


def write_digit_scenes(
    out: str | Path, num_train: int = 1000, num_val: int = 200, size: int = 96, seed: int = 0
) -> None:
    """Write scenes of digits at random places, sizes and contrasts on textured backgrounds, some overlapping.

    The digits of ``val`` are the test digits of :func:`split_digits`, those of ``train`` its training digits. Below
    ``out``: ``{train,val}/*.png`` (RGB images), ``labels/{train,val}/*.png`` (0: background, 1 to 10: digits 0 to 9)
    and, written last, ``annotations/{train,val}.json`` (COCO with boxes and RLE masks of the visible part; categories
    1 to 10; ``digit_id`` is the digit's index in scikit-learn's data).

    Args:
        out: Folder to write to; scenes of an earlier run are replaced.
        num_train, num_val: Number of training and validation scenes. Default to 1000 and 200.
        size: Side of the scenes in pixels, at least 32. Defaults to 96.
        seed: The same seed gives the same files. Defaults to 0.

    Raises:
        ValueError: A count is not positive, or ``size`` is below 32.
        OSError: A file cannot be written.
    """
    for name, value, least in (('num_train', num_train, 1), ('num_val', num_val, 1), ('size', size, 32)):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, but got {value}')
    out = Path(out)
    for number, (split, digits, count) in enumerate((('train', 'train', num_train), ('val', 'test', num_val))):
        generator = np.random.default_rng((seed, number))
        _write_split(out, split, split_digits()[digits], count, size, generator)


def draw_scene(digits: tuple, size: int, generator: np.random.Generator) -> tuple[np.ndarray, list[PlacedDigit]]:
    """Draw a scene of a part of :func:`split_digits`.

    Returns:
        uint8 (size, size, 3) in RGB, and its digits, from the lowest to the topmost.
    """
    images, labels, ids = digits
    scene = _background(size, generator)
    level = scene.mean()
    placed: list[PlacedDigit] = []
    area = (size / 96) ** 2
    least, most = (max(1, round(count * area)) for count in COUNTS)
    for _ in range(generator.integers(least, most + 1)):
        choice = generator.integers(len(images))
        ink = _place(images[choice], size, placed, generator)
        if ink is None:
            continue
        placed = [digit._replace(mask=digit.mask & (ink < INK)) for digit in placed]
        mask = ink >= INK
        placed.append(PlacedDigit(int(labels[choice]), int(ids[choice]), mask.sum(), mask))
        _paint(scene, ink, level, generator)
    return _add_noise(scene, generator), placed


@TRANSFORMS.register_module()
class PlaceDigit(BaseTransform):
    """Turn an image of a digit into a scene of that digit only, at a random place, size and contrast on a texture.

    Args:
        size (int): Side of the scene in pixels. Defaults to 32.
    """

    def __init__(self, size: int = 32):
        self.size = size

    def transform(self, results: dict) -> dict:
        generator = np.random.default_rng(np.random.randint(2**31))
        scene = _background(self.size, generator)
        _paint(scene, _ink(results['img'][..., 0], self.size, generator), scene.mean(), generator)
        results['img'] = _add_noise(scene, generator)
        results['img_shape'] = results['img'].shape[:2]
        return results


def _background(size: int, generator: np.random.Generator) -> np.ndarray:
    """Cloudy texture: smooth noise of several grain sizes, slightly colored."""
    texture = np.zeros((size, size))
    for cells in (2, 4, 8, 16, 32):
        noise = generator.normal(0, cells**-0.5, (cells, cells))
        texture += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    gray = generator.uniform(30, 100) + generator.uniform(8, 30) * texture / texture.std()
    return gray[..., None] * generator.uniform(0.85, 1.15, 3)


def _paint(scene: np.ndarray, ink: np.ndarray, level: float, generator: np.random.Generator) -> None:
    """Add ink (size, size) of a random color to the scene, brighter than the background's ``level``."""
    color = (level + generator.uniform(*CONTRASTS)) * generator.uniform(0.85, 1.15, 3)
    scene += ink[..., None] * (color - scene)


def _add_noise(scene: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The scene with camera noise, as uint8."""
    return (scene + generator.normal(0, 4, scene.shape)).clip(0, 255).round().astype(np.uint8)


def _ink(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Ink (size, size) from 0 to 1 of a digit (8, 8) at a random place and of a random size."""
    side = min(generator.integers(SIDES[0], SIDES[1] + 1), size)
    row, column = generator.integers(0, size - side + 1, 2)
    ink = np.zeros((size, size))
    digit = cv2.resize(image / 255, (side, side), interpolation=cv2.INTER_CUBIC)
    ink[row : row + side, column : column + side] = digit.clip(0, 1)
    return ink


def _place(image: np.ndarray, size: int, placed: list[PlacedDigit], generator: np.random.Generator):
    """Ink of a digit that does not hide others too much, or None if all attempts did."""
    for _ in range(ATTEMPTS):
        ink = _ink(image, size, generator)
        if all((other.mask & (ink < INK)).sum() >= (1 - MAX_HIDDEN) * other.area for other in placed):
            return ink
    return None


def _write_split(out: Path, split: str, digits: tuple, count: int, size: int, generator) -> None:
    for folder in (out / split, out / 'labels' / split, out / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob('*.png'):  # segmentation uses all images that it finds
            old.unlink()
    images, annotations = [], []
    for number in track(range(1, count + 1), f'Drawing {split}', console=Console(stderr=True)):
        scene, placed = draw_scene(digits, size, generator)
        name = f'{number:05d}.png'
        label_map = np.zeros((size, size), np.uint8)
        for digit in placed:
            label_map[digit.mask] = digit.label + 1
            annotations.append(_annotation(digit, len(annotations) + 1, number))
        _write(out / split / name, scene[..., ::-1])
        _write(out / 'labels' / split / name, label_map)
        images.append(dict(id=number, file_name=name, width=size, height=size))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(DIGITS)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (out / 'annotations' / f'{split}.json').write_text(json.dumps(content))


def _write(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f'cannot write {path}')


def _annotation(digit: PlacedDigit, number: int, image: int) -> dict:
    from pycocotools import mask as coco_mask  # comes with mmdet

    code = coco_mask.encode(np.asfortranarray(digit.mask.astype(np.uint8)))
    return dict(
        id=number,
        image_id=image,
        category_id=digit.label + 1,
        digit_id=digit.index,
        bbox=coco_mask.toBbox(code).tolist(),
        area=int(coco_mask.area(code)),
        segmentation=dict(size=code['size'], counts=code['counts'].decode()),
        iscrowd=0,
    )
