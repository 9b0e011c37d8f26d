"""Preprocess images with the steps of a config's test pipeline."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmcv.image.geometric import rescale_size
from mmcv.transforms import CenterCrop
from PIL import Image

from ..utils.config import bare_name
from ..utils.samples import tiff_tags

MAX_PIXELS = 2**26  # of a resized image, 8192 x 8192
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF')
# Options of LoadImageFromFile that predictions implement.
_LOADING = dict(to_float32=False, color_type='color', imdecode_backend='cv2')
_TILE = (322, 323)  # TIFF tags of a tile's width and height


def read_picture(path: str | Path) -> np.ndarray:
    """Read an image (H, W, 3), BGR in uint8, within Pillow's limit on pixels.

    Raises:
        ValueError: It is truncated, not an image, or has more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that start at half the limit
            file = Image.open(path, formats=FORMATS)
        with file:
            # Pillow checks the size and OpenCV decodes, so both must read the same size.
            if file.format == 'TIFF':
                _check_tiff(file, path)
            file.load()  # OpenCV accepts truncated files
        pixels = mmcv.imread(str(path))
        if pixels is None:
            raise ValueError(f'OpenCV cannot decode its pixels (mode {file.mode})')
    except Exception as error:  # each decoder has its own
        raise ValueError(f'{path} cannot be read as an image: {error}') from error
    return pixels


def _check_tiff(file: Image.Image, path: str | Path) -> None:
    """Refuse duplicate tags, of which libtiff reads the first and Pillow the last, and huge tiles, decoded whole."""
    tags = tiff_tags(path)
    if len(set(tags)) < len(tags):
        raise ValueError('its TIFF header has a tag twice')
    tile = [file.tag_v2.get(tag, 0) for tag in _TILE]
    if Image.MAX_IMAGE_PIXELS and tile[0] * tile[1] > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f'its tiles of {tile[1]} x {tile[0]} pixels are too large')


def steps_of(pipeline: Sequence[dict]) -> list[dict]:
    """The steps of a test pipeline in a toolbox's config that change pixels, as plain values.

    Raises:
        ValueError: A step is not in :data:`.description.STEPS`, or reads images in another way than predictions.
    """
    steps = []
    for step in pipeline:
        kind = bare_name(step)
        if kind == 'LoadImageFromFile':
            for name, value in _LOADING.items():
                if step.get(name, value) != value:
                    raise ValueError(
                        f'{name} of LoadImageFromFile in the test pipeline must be {value!r} for an export, '
                        f'but is {step[name]!r}'
                    )
        if kind == 'LoadImageFromFile' or kind.endswith('Annotations') or kind.startswith('Pack'):
            continue  # done by predictions, or not needed
        if kind not in _STEPS:
            raise ValueError(f'only test pipelines of {", ".join(_STEPS)} can be exported, but this one has {kind}')
        options = {key: value for key, value in step.items() if key not in ('type', '_scope_')}
        steps.append(dict(type=kind, **options))
    return steps


def size_of(steps: Sequence[dict], largest: bool = False) -> tuple[int, int] | None:
    """Height and width of all images after these steps; None if they differ.

    With ``largest``, that of the bounding box of images that keep their aspect ratio.
    """
    size = None
    for step in steps:
        if step['type'] == 'CenterCrop':
            size = _pair(step['crop_size'])[::-1]
        elif step['type'] == 'Resize' and (largest or not step.get('keep_ratio')) and step.get('scale'):
            size = _pair(step['scale'])[::-1]
        else:
            size = None
    return size


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def fits(size: Sequence[int], shape: Sequence[int], task: str) -> bool:
    """Whether a file with a fixed shape takes images of a size (H, W); a detector pads smaller ones."""
    return all(own <= side if task == 'detector' else own == side for own, side in zip(size, shape))


def run_steps(image: np.ndarray, steps: Sequence[dict]) -> np.ndarray:
    """Apply steps to an image (H, W, C), BGR in uint8; return pixels (C, H, W).

    Raises:
        ValueError: A step would give an empty image or too many pixels.
    """
    for step in steps:
        image = _STEPS[step['type']](image, **{key: value for key, value in step.items() if key != 'type'})
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _resize(image: np.ndarray, scale=None, scale_factor=None, keep_ratio: bool = False, **options) -> np.ndarray:
    """Like mmcv's Resize."""
    own = image.shape[1::-1]
    size = _pair(scale) if scale else tuple(int(side * by + 0.5) for side, by in zip(own, _pair(scale_factor)))
    return _resized(image, rescale_size(own, size) if keep_ratio else size, **options)


def _resize_edge(image: np.ndarray, scale: int, edge: str = 'short', **options) -> np.ndarray:
    """Like mmpretrain's ResizeEdge."""
    height, width = image.shape[:2]
    by_width = edge == 'width' or (edge == 'short' and width < height) or (edge == 'long' and width > height)
    size = (scale, int(scale * height / width)) if by_width else (int(scale * width / height), scale)
    return _resized(image, size, **options)


def _resized(
    image: np.ndarray,
    size: tuple[int, int],
    interpolation: str = 'bilinear',
    backend: str = 'cv2',
    clip_object_border: bool = True,  # only affects boxes
) -> np.ndarray:
    _check_size(image, size)
    return mmcv.imresize(image, size, interpolation=interpolation, backend=backend)


def _center_crop(image: np.ndarray, crop_size, **options) -> np.ndarray:
    size = _pair(crop_size)
    _check_size(image, tuple(map(max, size, image.shape[1::-1])))  # auto_pad enlarges the image
    return CenterCrop(size, **options)(dict(img=image))['img']


def _check_size(image: np.ndarray, size: tuple[int, int]) -> None:
    height, width = image.shape[:2]
    if min(size) < 1 or size[0] * size[1] > max(MAX_PIXELS, height * width):
        raise ValueError(
            f'its {height} x {width} pixels would become {size[1]} x {size[0]}, which is empty or too large'
        )


_STEPS = {'Resize': _resize, 'ResizeEdge': _resize_edge, 'CenterCrop': _center_crop}


def normalize(images: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None, flip: bool) -> np.ndarray:
    """Input (N, C, H, W), float32, of a network that was exported without ``--normalize``."""
    images = (images[:, ::-1] if flip else images).astype(np.float32)
    if mean is not None:
        images = (images - _column(mean)) / _column(std)
    return np.ascontiguousarray(images)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None]
