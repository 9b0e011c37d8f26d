"""From a picture to the pixels that a network takes, by the steps of a config's test pipeline."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmcv.image.geometric import rescale_size
from mmcv.transforms import CenterCrop
from PIL import Image

from ..utils.config import name_of
from ..utils.samples import tiff_tags

MAX_PIXELS = 2**26  # of what a picture is resized to, 8192 x 8192
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF')  # of pictures
# Of LoadImageFromFile: what predictions read pictures by.
_LOADING = dict(to_float32=False, color_type='color', imdecode_backend='cv2')
_TILE = (322, 323)  # TIFF's tags of a tile's sides


def read_picture(path: str | Path) -> np.ndarray:
    """A picture (H, W, 3) as OpenCV has it, BGR in uint8, within Pillow's limit on pixels.

    Raises:
        ValueError: It is cut short, another kind of file, or larger than twice ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of half the limit
            file = Image.open(path, formats=FORMATS)
        with file:
            # Pillow counts what OpenCV decodes, so both must read the same size.
            if file.format == 'TIFF':
                _check_tiff(file, path)
            file.load()  # OpenCV takes what is cut short
        pixels = mmcv.imread(str(path))
        if pixels is None:
            raise ValueError(f'OpenCV cannot decode its pixels, of the mode {file.mode}')
    except Exception as error:  # each decoder has its own
        raise ValueError(f'{path} cannot be read as a picture: {error}') from error
    return pixels


def _check_tiff(file: Image.Image, path: str | Path) -> None:
    """libtiff takes the first of several tags of a kind, Pillow the last; it decodes whole tiles."""
    tags = tiff_tags(path)
    if len(set(tags)) < len(tags):
        raise ValueError('its header names a field twice')
    tile = [file.tag_v2.get(tag, 0) for tag in _TILE]
    if Image.MAX_IMAGE_PIXELS and tile[0] * tile[1] > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f'its tiles have {tile[1]} x {tile[0]} pixels')


def steps_of(pipeline: Sequence[dict]) -> list[dict]:
    """The steps of a test pipeline that change pixels, as plain values.

    Args:
        pipeline: Of a toolbox's config.

    Raises:
        ValueError: A step is none of :data:`.description.STEPS`, or reads images otherwise than predictions do.
    """
    steps = []
    for step in pipeline:
        kind = name_of(step['type']).rpartition('.')[2]
        if kind == 'LoadImageFromFile':
            for name, value in _LOADING.items():
                if step.get(name, value) != value:
                    raise ValueError(
                        f"LoadImageFromFile's {name} must be {value!r} in the test pipeline to be exported, "
                        f'but got {step[name]!r}'
                    )
        if kind == 'LoadImageFromFile' or kind.endswith('Annotations') or kind.startswith('Pack'):
            continue  # what predictions do themselves, or without
        if kind not in _STEPS:
            raise ValueError(f'the test pipeline may have {", ".join(_STEPS)} to be exported, but it has {kind}')
        options = {key: value for key, value in step.items() if key not in ('type', '_scope_')}
        steps.append(dict(type=kind, **options))
    return steps


def size_of(steps: Sequence[dict], largest: bool = False) -> tuple[int, int] | None:
    """Height and width that all pictures have after these steps; None where they differ.

    Args:
        steps: Of :func:`steps_of`.
        largest: Of pictures that keep their ratio, what they fit into. Defaults to False.
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
    """Whether a file of one shape takes images of a size, both height and width; a detector pads smaller ones."""
    return all(own <= side if task == 'detector' else own == side for own, side in zip(size, shape))


def run_steps(image: np.ndarray, steps: Sequence[dict]) -> np.ndarray:
    """Pixels (C, H, W) in uint8 of a picture (H, W, C) as OpenCV has it, BGR.

    Raises:
        ValueError: A step would leave none of its pixels, or too many.
    """
    for step in steps:
        image = _STEPS[step['type']](image, **{key: value for key, value in step.items() if key != 'type'})
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _resize(image: np.ndarray, scale=None, scale_factor=None, keep_ratio: bool = False, **options) -> np.ndarray:
    """As mmcv's Resize."""
    own = image.shape[1::-1]
    size = _pair(scale) if scale else tuple(int(side * by + 0.5) for side, by in zip(own, _pair(scale_factor)))
    return _resized(image, rescale_size(own, size) if keep_ratio else size, **options)


def _resize_edge(image: np.ndarray, scale: int, edge: str = 'short', **options) -> np.ndarray:
    """As mmpretrain's ResizeEdge."""
    height, width = image.shape[:2]
    by_width = edge == 'width' or (edge == 'short' and width < height) or (edge == 'long' and width > height)
    size = (scale, int(scale * height / width)) if by_width else (int(scale * width / height), scale)
    return _resized(image, size, **options)


def _resized(
    image: np.ndarray,
    size: tuple[int, int],
    interpolation: str = 'bilinear',
    backend: str = 'cv2',
    clip_object_border: bool = True,  # of boxes
) -> np.ndarray:
    _check_size(image, size)
    return mmcv.imresize(image, size, interpolation=interpolation, backend=backend)


def _center_crop(image: np.ndarray, crop_size, **options) -> np.ndarray:
    size = _pair(crop_size)
    _check_size(image, tuple(map(max, size, image.shape[1::-1])))  # padded
    return CenterCrop(size, **options)(dict(img=image))['img']


def _check_size(image: np.ndarray, size: tuple[int, int]) -> None:
    height, width = image.shape[:2]
    if min(size) < 1 or size[0] * size[1] > max(MAX_PIXELS, height * width):
        raise ValueError(f'its {height} x {width} pixels would become {size[1]} x {size[0]}')


_STEPS = {'Resize': _resize, 'ResizeEdge': _resize_edge, 'CenterCrop': _center_crop}


def normalise(images: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None, flip: bool) -> np.ndarray:
    """Pixels (N, C, H, W) as a network without ``--normalize`` takes them, in float32."""
    images = (images[:, ::-1] if flip else images).astype(np.float32)
    if mean is not None:
        images = (images - _column(mean)) / _column(std)
    return np.ascontiguousarray(images)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None]
