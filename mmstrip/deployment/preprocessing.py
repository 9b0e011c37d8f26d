"""From a picture to the pixels that a network takes, by the steps of a config's test pipeline."""

from collections.abc import Sequence

import mmcv
import numpy as np
from mmcv.transforms import CenterCrop, Resize

from ..utils.config import name_of


def _resize_edge(image: np.ndarray, scale: int, edge: str = 'short', **options) -> np.ndarray:
    """As mmpretrain's ResizeEdge."""
    height, width = image.shape[:2]
    by_width = edge == 'width' or (edge == 'short' and width < height) or (edge == 'long' and width > height)
    size = (scale, int(scale * height / width)) if by_width else (int(scale * width / height), scale)
    return mmcv.imresize(image, size, **options)


# Of LoadImageFromFile: what predictions read pictures by.
_LOADING = dict(to_float32=False, color_type='color', imdecode_backend='cv2')
STEPS = {
    'Resize': lambda image, **options: Resize(**options)(dict(img=image))['img'],
    'ResizeEdge': _resize_edge,
    'CenterCrop': lambda image, **options: CenterCrop(**options)(dict(img=image))['img'],
}


def steps_of(pipeline: Sequence[dict]) -> list[dict]:
    """The steps of a test pipeline that change pixels, as plain values.

    Args:
        pipeline: Of a toolbox's config.

    Raises:
        ValueError: A step is none of :data:`STEPS`, or reads images otherwise than predictions do.
    """
    steps = []
    for step in pipeline:
        kind = name_of(step['type']).rpartition('.')[2]
        if kind == 'LoadImageFromFile':
            _check_loading(step)
        if kind == 'LoadImageFromFile' or kind.endswith('Annotations') or kind.startswith('Pack'):
            continue  # what predictions do themselves, or without
        if kind not in STEPS:
            raise ValueError(f'the test pipeline may have {", ".join(STEPS)} to be exported, but it has {kind}')
        options = {key: value for key, value in step.items() if key not in ('type', '_scope_')}
        steps.append(dict(type=kind, **options))
    return steps


def _check_loading(step: dict) -> None:
    for name, value in _LOADING.items():
        if step.get(name, value) != value:
            raise ValueError(
                f"LoadImageFromFile's {name} must be {value!r} in the test pipeline to be exported, "
                f'but got {step[name]!r}'
            )


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


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def fits(size: Sequence[int], shape: Sequence[int], task: str) -> bool:
    """Whether a file of one shape takes images of a size, both height and width; a detector pads smaller ones."""
    return all(own <= side if task == 'detector' else own == side for own, side in zip(size, shape))


def run_steps(image: np.ndarray, steps: Sequence[dict]) -> np.ndarray:
    """Pixels (C, H, W) in uint8 of a picture (H, W, C) as OpenCV has it, BGR."""
    for step in steps:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in step.items()}
        image = STEPS[options.pop('type')](image, **options)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def normalise(images: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None, flip: bool) -> np.ndarray:
    """Pixels (N, C, H, W) as a network without ``--normalize`` takes them, in float32."""
    images = (images[:, ::-1] if flip else images).astype(np.float32)
    if mean is not None:
        images = (images - _column(mean)) / _column(std)
    return np.ascontiguousarray(images)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None]
