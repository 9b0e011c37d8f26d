"""Effective receptive fields: how much each pixel of the input counts in the central feature of a stage.

The gradient as the measure: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural
Networks" (2016). Squares that hold a share of it, to compare backbones: Ding et al., "Scaling Up Your Kernels to 31x31"
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
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from ..utils.checkpoints import load_whole, read_checkpoint, weights_in
from ..utils.config import load_config
from ..utils.files import write_file
from ..utils.plots import plot_fields
from ..utils.samples import IMAGE_SUFFIXES
from .specs import ModelSpec, random_model

SHARES = (0.2, 0.3, 0.5, 0.99)
_BATCH = 8
_IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


@dataclass
class Field:
    """The effective receptive field of a feature.

    Attributes:
        contributions: (H, W), of each pixel; their sum is 1.
        stride: Pixels from one feature to the next.
    """

    contributions: np.ndarray
    stride: float

    @property
    def center(self) -> tuple[float, float]:
        """Row and column that half of the contributions lie before, from the corner of the image, to half a pixel.

        Where in its cell a feature looks is the network's affair: strided convolutions look at the cell's corner,
        patches at its middle.
        """
        row, column = (_middle(self.contributions.sum(axis)) for axis in (1, 0))
        return row, column

    def side(self, share: float) -> float:
        """Side of the smallest square around the center that holds a share of all contributions, in pixels."""
        rows, columns = (
            np.abs(np.arange(length) + 0.5 - middle) for length, middle in zip(self.contributions.shape, self.center)
        )
        sides = 2 * np.maximum(rows[:, None], columns) + 1
        order = np.argsort(sides, axis=None)
        held = np.cumsum(self.contributions.ravel()[order], dtype=float)
        return float(sides.ravel()[order][np.searchsorted(held, share * held[-1] * (1 - 1e-9))])

    def area(self, share: float) -> float:
        """The part of that square that lies in the image, as a share (0 to 1) of the image."""
        lengths = [
            min(length, middle + self.side(share) / 2) - max(0, middle - self.side(share) / 2)
            for length, middle in zip(self.contributions.shape, self.center)
        ]
        return lengths[0] * lengths[1] / self.contributions.size


def _middle(weights: np.ndarray) -> float:
    """Where half of the weights of a line of pixels is reached, each spread over its pixel."""
    held = np.concatenate([[0.0], np.cumsum(weights, dtype=float)])
    return float(np.round(2 * np.interp(held[-1] / 2, held, np.arange(len(held)))) / 2)


def receptive_field(backbone: nn.Module, images: Tensor) -> Field:
    """The gradient of the central feature of the last map, the positive part of it summed over channels, to the input.

    Its absolute value is averaged over images and colour channels. Where a map has an even number of features, the
    central one is the first after the middle. The positive part, as in the code of Ding et al., because channels after
    a LayerNorm add up to a constant, which has no gradient.

    Args:
        backbone: Gives a map (N, C, h, w) or a sequence of them; it is evaluated, with its statistics as they are.
        images: (N, 3, H, W), normalised.

    Raises:
        ValueError: It fails on the images, its output is no map, or the central feature does not depend on the images.
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
    except (AssertionError, RuntimeError, ValueError) as error:  # such as images that are too small for its windows
        raise ValueError(f'{name} fails on images {tuple(images.shape)}: {str(error).strip()}') from error
    outputs = outputs[-1] if isinstance(outputs, (tuple, list)) else outputs
    if not isinstance(outputs, Tensor) or outputs.dim() != 4:
        shape = tuple(getattr(outputs, 'shape', ())) or type(outputs).__name__
        raise ValueError(f'{name} must give maps (N, C, h, w), but gives {shape}')
    return outputs


@dataclass
class Subject:
    """A backbone to look at, and what its images go through.

    Attributes:
        label: Name in tables and pictures.
        backbone: The module.
        stage: Index of its last map, from 0.
        mean, std: Of its training images, three numbers each.
        to_rgb: Whether it takes RGB; else BGR.
    """

    label: str
    backbone: nn.Module
    stage: int
    mean: Sequence[float]
    std: Sequence[float]
    to_rgb: bool

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in RGB from 0 to 255, as the backbone takes them."""
        images = images if self.to_rgb else images.flip(1)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def load_subject(text: str, checkpoint: str | None = None, stage: int | None = None, trusted: bool = False) -> Subject:
    """Build a backbone and fill it.

    Args:
        text: ``[LABEL=]CONFIG.py`` or ``[LABEL=]TYPE[:KEY=VALUE,...]``, as of :class:`.specs.ModelSpec`.
        checkpoint: File with its weights, of a model or of the backbone alone; None for random ones.
        stage: Index of the stage whose map is looked at, from 0; None for the last one that the config asks for.
        trusted: Run the code that the checkpoint may ask for. Defaults to False.

    Raises:
        FileNotFoundError: The config or the checkpoint is missing.
        ValueError: The type is not registered, the backbone has no such stage, or the checkpoint does not fill it.
    """
    spec = ModelSpec.parse(text)
    config, preprocessor = _read_settings(spec)
    backbone = random_model(config)
    if checkpoint is not None:
        _fill(backbone, checkpoint, trusted)
    if stage is not None and tuple(config.get('out_indices', ())) != (stage,):
        backbone, own = _build_stage(spec.label, config, stage), backbone
        backbone.load_state_dict(own.state_dict(), strict=False)  # without later stages; with norms of this one
    else:
        indices = getattr(backbone, 'out_indices', (0,))
        stage = indices if isinstance(indices, int) else max(indices)
    to_rgb = preprocessor.get('to_rgb', preprocessor.get('bgr_to_rgb', False))
    return Subject(spec.label, backbone, stage, preprocessor['mean'], preprocessor['std'], to_rgb)


def _read_settings(spec: ModelSpec) -> tuple[dict, dict]:
    """Configs of the backbone and of the data preprocessor."""
    if not spec.source.endswith('.py'):
        return spec.backbone_config(), _IMAGENET
    config = load_config(spec.source)
    init_default_scope(config.get('default_scope', 'mmengine'))
    if 'backbone' not in config.get('model', {}):
        raise ValueError(f'{spec.source} must be a config with model.backbone')
    preprocessor = config.model.get('data_preprocessor') or config.get('data_preprocessor') or {}
    return config.model.backbone, preprocessor if 'mean' in preprocessor else _IMAGENET


def _build_stage(label: str, config: dict, stage: int) -> nn.Module:
    try:
        return random_model({**config, 'out_indices': (stage,)})
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f'{label} has no stage {stage}: {str(error).strip() or type(error).__name__}') from error


def _fill(backbone: nn.Module, path: str, trusted: bool) -> None:
    weights = weights_in(read_checkpoint(path, trusted=trusted))
    prefix = 'backbone.'
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    problem = load_whole(backbone, weights)
    if problem:
        raise ValueError(f'{path} must fill the {type(backbone).__name__}, but {problem}')


def find_images(paths: Sequence[str | Path], count: int) -> list[Path]:
    """So many of the images in files and folders, at equal distances of their sorted names.

    Raises:
        FileNotFoundError: A path is missing, or there is no image.
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
    """The middle square of each image.

    Args:
        files: Image files.
        size: Side of the squares in pixels; the shorter edge of an image is brought to it.

    Returns:
        (N, 3, size, size) in RGB from 0 to 255.

    Raises:
        ValueError: A file is not a readable image.
    """
    squares = []
    for file in files:
        try:
            image = mmcv.imread(file, channel_order='rgb', backend='pillow')
        except OSError as error:
            raise ValueError(f'{file} is not a readable image: {error}') from error
        height, width = image.shape[:2]
        scale = size / min(height, width)
        height, width = max(size, round(height * scale)), max(size, round(width * scale))
        image = mmcv.imresize(image, (width, height), interpolation='bicubic', backend='pillow')
        top, left = (height - size) // 2, (width - size) // 2
        squares.append(image[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float()


def compare_fields(subjects: Sequence[Subject], images: Tensor, out: str | Path) -> list[dict]:
    """Measure effective receptive fields; write ``receptive_field.json`` and ``receptive_field.png``.

    Args:
        subjects: Backbones.
        images: (N, 3, H, W) in RGB from 0 to 255, the same for all.
        out: Folder for the files.

    Returns:
        What the JSON file holds, one dict for each: 'label', 'stage', 'stride', 'images', 'size' (H, W), and 'sides' in
        pixels and 'areas' (0 to 1, of the image) of the smallest squares, by the share that they hold in percent.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results, panels = [], {}
    for subject in subjects:
        field = receptive_field(subject.backbone, subject.normalise(images))
        sides = {f'{100 * share:g}': field.side(share) for share in SHARES}
        areas = {f'{100 * share:g}': round(field.area(share), 4) for share in SHARES}
        shape = dict(stride=field.stride, images=len(images), size=list(images.shape[2:]))
        results.append(dict(label=subject.label, stage=subject.stage, **shape, sides=sides, areas=areas))
        panels[subject.label] = (field.contributions, field.center, [sides['50'], sides['99']])
    write_file(out / 'receptive_field.json', lambda file: file.write(json.dumps(results, indent=1).encode()))
    plot_fields(panels, out / 'receptive_field.png')
    return results
