"""Effective receptive fields: how much each input pixel contributes to the central feature of a stage.

Measured by the gradient: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural
Networks" (2016). Compared by squares that contain a fraction of it: Ding et al., "Scaling Up Your Kernels to 31x31"
(2022).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
import torch
from torch import Tensor, nn

from ..utils.checkpoints import load_full_state_dict, read_checkpoint, weights_in
from ..utils.config import load_model_config
from ..utils.files import write_file
from ..utils.plots import plot_fields
from ..utils.samples import IMAGE_SUFFIXES, reason_of
from .specs import ModelSpec, random_model

SHARES = (0.2, 0.3, 0.5, 0.99)
_BATCH = 8
_IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


@dataclass
class Field:
    """The effective receptive field of a feature."""

    contributions: np.ndarray  # (H, W), one per pixel; they add up to 1
    stride: float  # pixels between neighboring features

    @property
    def center(self) -> tuple[float, float]:
        """Row and column of the median contribution, in pixels from the image corner, rounded to half a pixel.

        It depends on the network where in its cell a feature looks: strided convolutions look at the corner, patch
        embeddings at the middle.
        """
        return _median_position(self.contributions.sum(1)), _median_position(self.contributions.sum(0))

    def side(self, share: float) -> float:
        """Side in pixels of the smallest square around the center with this share (0 to 1) of all contributions."""
        rows, columns = (
            np.abs(np.arange(length) + 0.5 - middle) for length, middle in zip(self.contributions.shape, self.center)
        )
        sides = 2 * np.maximum(rows[:, None], columns) + 1
        order = np.argsort(sides, axis=None)
        held = np.cumsum(self.contributions.ravel()[order], dtype=float)
        return float(sides.ravel()[order][np.searchsorted(held, share * held[-1] * (1 - 1e-9))])

    def area(self, share: float) -> float:
        """Fraction of the image (0 to 1) that this square covers."""
        lengths = [
            min(length, middle + self.side(share) / 2) - max(0, middle - self.side(share) / 2)
            for length, middle in zip(self.contributions.shape, self.center)
        ]
        return lengths[0] * lengths[1] / self.contributions.size


def _median_position(weights: np.ndarray) -> float:
    """Position where half of the weights of a line of pixels is reached, each spread over its pixel."""
    held = np.concatenate([[0.0], np.cumsum(weights, dtype=float)])
    return float(np.round(2 * np.interp(held[-1] / 2, held, np.arange(len(held)))) / 2)


def receptive_field(backbone: nn.Module, images: Tensor) -> Field:
    """Gradient of the central feature of the last map, its positive part summed over channels, w.r.t. the input.

    Its absolute value is averaged over images and color channels. In a map of even size, the central feature is the
    first one after the middle. The positive part is used, as in the code of Ding et al., because channels after a
    LayerNorm add up to a constant, which has no gradient.

    Args:
        backbone: Module that returns a feature map (N, C, h, w) or a sequence of them; it runs in eval mode.
        images: (N, 3, H, W), normalized.

    Raises:
        ValueError: The backbone fails on the images, returns no map, or its central feature does not depend on them.
    """
    backbone.eval()
    backbone.requires_grad_(False)
    total = torch.zeros(images.shape[2:], dtype=torch.float64)
    for part in images.split(_BATCH):
        part = part.clone().requires_grad_()
        feature_map = _last_map(backbone, part)
        size = feature_map.shape[2:]
        central = feature_map[:, :, size[0] // 2, size[1] // 2].relu().sum()
        (gradient,) = torch.autograd.grad(central, part)
        total += gradient.abs().sum((0, 1)).double().cpu()
    if not (torch.isfinite(total).all() and total.any()):
        raise ValueError(f'{type(backbone).__name__}: the gradient of the central feature is zero or not finite')
    return Field((total / total.sum()).numpy(), images.shape[2] / size[0])


def _last_map(backbone: nn.Module, images: Tensor) -> Tensor:
    name = type(backbone).__name__
    try:
        outputs = backbone(images)
    except (AssertionError, RuntimeError, ValueError) as error:  # such as images smaller than its windows
        raise ValueError(f'{name} fails on images {tuple(images.shape)}: {str(error).strip()}') from error
    outputs = outputs[-1] if isinstance(outputs, (tuple, list)) else outputs
    if not isinstance(outputs, Tensor) or outputs.dim() != 4:
        shape = tuple(getattr(outputs, 'shape', ())) or type(outputs).__name__
        raise ValueError(f'{name} must return feature maps (N, C, h, w), but returns {shape}')
    return outputs


@dataclass
class LabeledBackbone:
    """A backbone with a label and the normalization of its images."""

    label: str  # in tables and pictures
    backbone: nn.Module
    stage: int  # of its last map, from 0
    mean: Sequence[float]
    std: Sequence[float]
    to_rgb: bool  # whether it takes RGB, not BGR

    def normalize(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in RGB from 0 to 255 as input of the backbone."""
        images = images if self.to_rgb else images.flip(1)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def load_backbone(
    text: str, checkpoint: str | None = None, stage: int | None = None, trusted: bool = False
) -> LabeledBackbone:
    """Build a backbone and load its weights.

    Args:
        text: ``[LABEL=]CONFIG.py`` or ``[LABEL=]TYPE[:KEY=VALUE,...]``, see :class:`.specs.ModelSpec`.
        checkpoint: File with weights of a model or of the backbone alone. Defaults to None, random weights.
        stage: Index of the stage to analyze, from 0. Defaults to None, the last output of the config.
        trusted: Let the checkpoint run code. Defaults to False.

    Raises:
        FileNotFoundError: The config or the checkpoint is missing.
        ValueError: The type is not registered, the backbone has no such stage, or the checkpoint does not fit it.
    """
    spec = ModelSpec.parse(text)
    config, preprocessor = _read_settings(spec)
    backbone = random_model(config)
    if checkpoint is not None:
        _load_weights(backbone, checkpoint, trusted)
    if stage is not None and tuple(config.get('out_indices', ())) != (stage,):
        weights = backbone.state_dict()
        try:
            backbone = random_model({**config, 'out_indices': (stage,)})
        except ValueError as error:
            raise ValueError(f'{spec.label} has no stage {stage}: {error}') from error
        backbone.load_state_dict(weights, strict=False)  # without later stages, with norms of this one
    else:
        indices = getattr(backbone, 'out_indices', (0,))
        stage = indices if isinstance(indices, int) else max(indices)
    to_rgb = preprocessor.get('to_rgb', preprocessor.get('bgr_to_rgb', False))
    return LabeledBackbone(spec.label, backbone, stage, preprocessor['mean'], preprocessor['std'], to_rgb)


def _read_settings(spec: ModelSpec) -> tuple[dict, dict]:
    """Configs of the backbone and of the data preprocessor."""
    if not spec.source.endswith('.py'):
        return spec.backbone_config(), _IMAGENET
    config = load_model_config(spec.source)
    if 'backbone' not in config.model:
        raise ValueError(f'{spec.source} has no model.backbone')
    preprocessor = config.model.get('data_preprocessor') or config.get('data_preprocessor') or {}
    return config.model.backbone, preprocessor if 'mean' in preprocessor else _IMAGENET


def _load_weights(backbone: nn.Module, path: str, trusted: bool) -> None:
    weights = weights_in(read_checkpoint(path, trusted=trusted))
    prefix = 'backbone.'
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    problem = load_full_state_dict(backbone, weights)
    if problem:
        raise ValueError(f'{path} does not fit the {type(backbone).__name__}: it {problem}')


def find_images(paths: Sequence[str | Path], count: int) -> list[Path]:
    """Choose ``count`` images from files and folders, evenly spaced by sorted name.

    Raises:
        FileNotFoundError: A path does not exist, or there is no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f'no image file or folder at {path}')
        folders = os.walk(path, followlinks=True) if path.is_dir() else [(path.parent, [], [path.name])]
        files = sorted(Path(folder, name) for folder, _, names in folders for name in names)
        found += [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise FileNotFoundError(f'no image ({", ".join(IMAGE_SUFFIXES)}) in {", ".join(map(str, paths))}')
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[place] for place in places]


def read_images(files: Sequence[Path], size: int) -> Tensor:
    """The central square of each image, whose shorter side is resized to ``size``: (N, 3, size, size), RGB, 0 to 255.

    Raises:
        ValueError: A file is not a readable image.
    """
    squares = []
    for file in files:
        try:
            image = mmcv.imread(file, channel_order='rgb', backend='pillow')
        except OSError as error:
            raise ValueError(f'{file} is not a readable image: {reason_of(error)}') from error
        height, width = image.shape[:2]
        scale = size / min(height, width)
        height, width = max(size, round(height * scale)), max(size, round(width * scale))
        image = mmcv.imresize(image, (width, height), interpolation='bicubic', backend='pillow')
        top, left = (height - size) // 2, (width - size) // 2
        squares.append(image[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float()


def compare_fields(backbones: Sequence[LabeledBackbone], images: Tensor, out: str | Path) -> list[dict]:
    """Measure effective receptive fields on images (N, 3, H, W), RGB, 0 to 255.

    The folder ``out`` gets ``receptive_field.json`` and ``receptive_field.png``.

    Returns:
        The content of the JSON file, one dict per backbone: 'label', 'stage', 'stride', 'images', 'size' (H, W), and
        'sides' in pixels and 'areas' (0 to 1, of the image) of the smallest squares, by their percentage.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results, panels = [], {}
    for item in backbones:
        field = receptive_field(item.backbone, item.normalize(images))
        sides = {f'{100 * share:g}': field.side(share) for share in SHARES}
        areas = {f'{100 * share:g}': round(field.area(share), 4) for share in SHARES}
        shape = dict(stride=field.stride, images=len(images), size=list(images.shape[2:]))
        results.append(dict(label=item.label, stage=item.stage, **shape, sides=sides, areas=areas))
        panels[item.label] = (field.contributions, field.center, [sides['50'], sides['99']])
    write_file(out / 'receptive_field.json', lambda file: file.write(json.dumps(results, indent=1).encode()))
    plot_fields(panels, out / 'receptive_field.png')
    return results
