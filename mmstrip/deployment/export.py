"""Export a config and its checkpoint to a file that runs without them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..models import StripMLP
from ..utils.checkpoints import load_full_checkpoint
from ..utils.config import build_model, dataset_class, leaf_datasets, load_model_config
from ..version import __version__
from . import any_size
from .description import check_about
from .detections import detections_of, disagreement, values_of
from .formats import DYNAMIC_SIDES, check_format, write, written_atomically
from .mmdeploy import check_detector
from .preprocessing import fits, size_of, steps_of
from .runtimes import Session, open_session

TOLERANCES = {False: 1e-4, True: 2e-2}  # relative to the largest output: float32 weights, float16 weights
_DEFAULT_SIDE = 224
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Export:
    """Export settings.

    Attributes:
        format: One of :data:`.formats.SUFFIXES`. Defaults to 'onnx'.
        part: 'whole' (the default): a classifier's logits, a segmentor's logits at the size of its input, or a
            detector's boxes; 'backbone': its maps; 'neck': the maps of the neck.
        shape: Height and width in pixels. Defaults to the crop or fixed size of the test pipeline, for detectors its
            scale, then to the ``size`` of a segmentor's ``data_preprocessor``, then to 224.
        dynamic_batch, dynamic_size: See :func:`.formats.trace`. The batch is 1 otherwise.
        opset, half: See :func:`.formats.to_onnx` and :func:`.formats.halve`.
        normalize: Take pixels, BGR in uint8, and normalize them in the graph.
        scores: Output a classifier's scores instead of logits.
    """

    format: str = 'onnx'
    part: str = 'whole'
    shape: tuple[int, int] | None = None
    dynamic_batch: bool = False
    dynamic_size: bool = False
    opset: int | None = None
    half: bool = False
    normalize: bool = False
    scores: bool = False


class Network(nn.Module):
    """The network in a file: images (N, C, H, W) to a tuple of outputs.

    ``model`` is a toolbox's, in evaluation mode; ``task`` see :func:`task_of`; ``normalize`` and ``scores`` see
    :class:`Export`.
    """

    def __init__(self, model: nn.Module, task: str, normalize: bool = False, scores: bool = False):
        super().__init__()
        self.model, self.task, self.normalize, self.scores = model, task, normalize, scores
        self.flip, mean, std = normalization(model)
        for name, values in (('mean', mean), ('std', std)):
            column = None if values is None else torch.tensor(values)[:, None, None]
            self.register_buffer(f'pixel_{name}', column if normalize else None)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.normalize:
            images = (images.flip(1) if self.flip else images).float()
            if self.pixel_mean is not None:
                images = (images - self.pixel_mean) / self.pixel_std
        if self.task == 'classifier':
            logits = self.model(images, mode='tensor')
            return (logits.softmax(1) if self.scores else logits,)
        if self.task == 'segmentor':
            padded = _pad(images, *_test_padding(self.model))
            size = tuple(padded.shape[2:])
            logits = self.model.encode_decode(padded, [dict(img_shape=size, pad_shape=size)])
            return (logits if padded is images else _cropped(logits, images),)
        if self.task == 'detector':
            return self._detect(images)
        maps = self.model.backbone(images)
        return tuple(self.model.neck(maps) if self.task == 'neck' else maps)

    def _detect(self, images: Tensor):
        """mmdet's results of one image; tensors while mmdeploy traces (see :mod:`.mmdeploy`)."""
        from mmdet.structures import DetDataSample

        model, size = self.model, tuple(map(int, images.shape[2:]))
        images = _pad(images, *_test_padding(model))
        about = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), batch_input_shape=tuple(images.shape[2:]))
        samples, maps = [DetDataSample(metainfo=about)], model.extract_feat(images)
        if hasattr(model, 'roi_head'):
            proposals = model.rpn_head.predict(maps, samples, rescale=False)
            return model.roi_head.predict(maps, proposals, samples, rescale=False)
        return model.bbox_head.predict(maps, samples, rescale=False)


def _test_padding(model: nn.Module) -> tuple[int, float]:
    """The divisor that a model's preprocessing pads test images to multiples of, and the padding value."""
    before = model.data_preprocessor
    if hasattr(before, 'test_cfg'):  # mmseg's
        return (before.test_cfg or {}).get('size_divisor', 1), before.pad_val
    return before.pad_size_divisor, before.pad_value


def _pad(images: Tensor, divisor: int, value: float) -> Tensor:
    """Pad on the right and at the bottom."""
    height, width = images.shape[2:]
    return images if divisor == 1 else F.pad(images, (0, -width % divisor, 0, -height % divisor), value=value)


def _cropped(logits: Tensor, images: Tensor) -> Tensor:
    """Crop the padding; as a copy, because a view would tie the traced program to padded sizes."""
    for dim in (2, 3):
        logits = logits.index_select(dim, torch.arange(images.shape[dim], device=images.device))
    return logits


def normalization(model: nn.Module) -> tuple[bool, list[float] | None, list[float] | None]:
    """Whether a model's preprocessing converts BGR to RGB, and its mean and standard deviation, if any."""
    before = model.data_preprocessor
    flip = bool(getattr(before, 'to_rgb', False) or getattr(before, '_channel_conversion', False))
    mean, std = (getattr(before, name, None) for name in ('mean', 'std'))
    return flip, *(None if values is None else values.flatten().tolist() for values in (mean, std))


def check_padding(model: nn.Module) -> None:
    """Check that a model's preprocessing pads images like exported files do.

    Raises:
        ValueError: It pads test images to a fixed size, or is that of a classifier and pads them.
    """
    before = model.data_preprocessor
    if getattr(before, 'pad_size_divisor', 1) > 1 and type(before).__name__ == 'ClsDataPreprocessor':
        raise ValueError(
            f'model.data_preprocessor.pad_size_divisor must be 1 for an export, but is {before.pad_size_divisor}'
        )
    if (getattr(before, 'test_cfg', None) or {}).get('size'):
        raise ValueError('exported files do not pad to a fixed size: remove model.data_preprocessor.test_cfg.size')


def task_of(model: nn.Module, part: str) -> str:
    """The task that a model or its part is exported for: 'classifier', 'segmentor', 'detector', 'backbone' or 'neck'.

    Raises:
        ValueError: The model cannot be exported or has no such part.
    """
    name = type(model).__name__
    if part != 'whole':
        if getattr(model, part, None) is None:
            raise ValueError(f'{name} has no {part} to export')
        return part
    if _is_a(model, 'mmpretrain', 'ImageClassifier'):
        kind, base = type(model.head), _is_a(model.head, 'mmpretrain', 'ClsHead')
        if not base or any(getattr(kind, name) is not getattr(base, name) for name in ('predict', '_get_predictions')):
            raise ValueError(f'only single-label classifiers can be exported, but the head is {kind.__name__}')
        return 'classifier'
    if _is_a(model, 'mmseg', 'EncoderDecoder'):
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise ValueError(
                'only segmentors with model.test_cfg.mode=whole can be exported, but the mode is '
                f'{model.test_cfg.mode!r}; pass --cfg-options model.test_cfg.mode=whole'
            )
        return 'segmentor'
    if _is_a(model, 'mmdet', 'SingleStageDetector') or _is_a(model, 'mmdet', 'TwoStageDetector'):
        return 'detector'
    raise ValueError(f'{name} cannot be exported whole; export its backbone (--features) or neck (--neck)')


def _is_a(module: nn.Module, package: str, name: str) -> type | None:
    """The toolbox's class of that name if a module is an instance of it, without importing the toolbox."""
    kinds = (kind for kind in type(module).mro() if kind.__module__.startswith(f'{package}.'))
    return next((kind for kind in kinds if kind.__name__ == name), None)


def export_model(
    config: str, checkpoint: str, out: str | Path, settings: Export, options: dict | None = None, trusted: bool = False
) -> float | None:
    """Export a trained model, and compare the file in its runtime with PyTorch.

    Args:
        config: Config file of a toolbox.
        checkpoint: Checkpoint with all weights of the model.
        out: File to write, atomically.
        settings: Export settings.
        options: Overrides of the config, see ``--cfg-options``.
        trusted: Run code that ``checkpoint`` may contain. Defaults to False.

    Returns:
        The largest difference of an output relative to the largest value; for a detector, of a score or of a coordinate
        relative to the image's longer side, None if it finds nothing in random images.

    Raises:
        FileNotFoundError: The config, the checkpoint or the folder of ``out`` is missing.
        ValueError: The model cannot be exported with these settings, or the outputs differ by more than
            :data:`TOLERANCES`; nothing is written.
    """
    check_format(settings.format, out, settings.half, settings.opset)
    loaded = load_model_config(config, options)
    if loaded.get('data_preprocessor'):
        loaded.model.setdefault('data_preprocessor', loaded.data_preprocessor)  # like mmengine's Runner
    with torch.random.fork_rng(devices=()):
        model = build_model(loaded.model).eval().requires_grad_(False)
    task = task_of(model, settings.part)
    if settings.part == 'whole':
        check_padding(model)
    if settings.scores and task != 'classifier':
        raise ValueError(f'--scores is for classifiers, but {config} exports a {task}')
    if task == 'detector':
        check_detector(settings.format, settings.dynamic_batch or settings.dynamic_size)
    meta = load_full_checkpoint(model, config, checkpoint, trusted)['meta']
    if hasattr(model.backbone, 'switch_to_deploy'):
        model.backbone.switch_to_deploy()
    if task == 'segmentor' and settings.dynamic_size:
        any_size.prepare(model)
    network = Network(ops.restore(model), task, settings.normalize, settings.scores).eval()
    about = _describe(network, loaded, settings, meta)
    images = _images(about, 2 if settings.dynamic_batch else 1, about['shape'])
    with torch.no_grad():
        about['outputs'] = _output_names(network, images)
        check_about(json.loads(json.dumps(about)), out)
        with written_atomically(out) as made:
            write(made, network, images, about)
            error = check(network, open_session(made, trusted=True), about)
            if error is not None and not error < TOLERANCES[settings.half]:
                raise ValueError(
                    f"{out}: the outputs differ from PyTorch's by {error:.1e} of the largest value, but "
                    f'{TOLERANCES[settings.half]:.0e} is allowed; nothing was written'
                )
    return error


def _output_names(network: Network, images: Tensor) -> list[str]:
    if network.task == 'detector':
        return ['boxes', 'labels', *(['masks'] if network.model.with_mask else [])]
    if network.task in ('backbone', 'neck'):
        shapes = [tuple(output.shape) for output in network(images)]
        if any(len(shape) != 4 for shape in shapes):
            raise ValueError(f'only maps (N, C, H, W) can be exported, but the {network.task} gives {shapes}')
        return [f'map{i}' for i in range(len(shapes))]
    return ['scores' if network.scores else 'logits']


def _describe(network: Network, config, settings: Export, meta: dict) -> dict:
    """The description of a file: all that predictions need."""
    _, dataset = next(leaf_datasets(config, 'test_dataloader.dataset'), (None, {}))
    steps = _steps_of(dataset, settings.part)
    flip, mean, std = normalization(network.model)
    return dict(
        task=network.task,
        classes=_classes_of(network.model, meta, dataset),
        steps=steps,
        flip=flip,
        mean=mean,
        std=std,
        channels=channels_of(network.model),
        align_corners=getattr(network.model, 'align_corners', None),
        threshold=_threshold(network),
        pad_value=_test_padding(network.model)[1] if network.task == 'detector' else None,
        version=__version__,
        **{**asdict(settings), 'shape': list(_shape_of(network, steps, settings))},
    )


def _steps_of(dataset: dict, part: str) -> list[dict]:
    """Steps of a test pipeline; none if the pipeline cannot be exported and only a part of the model is."""
    try:
        return steps_of(dataset.get('pipeline') or [])
    except ValueError:
        if part == 'whole':
            raise
        return []


def _classes_of(model: nn.Module, meta: dict, dataset: dict) -> list[str] | None:
    """Class names stored with the weights, else those of the test set if a head has that many classes."""
    stored = (meta.get('dataset_meta') or {}).get('classes')
    if stored is not None:
        return list(stored)
    known = dict(getattr(dataset_class(dataset), 'METAINFO', {}) if dataset else {})
    names = dataset.get('classes') or {**known, **(dataset.get('metainfo') or {})}.get('classes')
    counts = {getattr(module, 'num_classes', None) for module in model.modules()}
    return list(names) if isinstance(names, (list, tuple)) and len(names) in counts else None


def channels_of(model: nn.Module) -> int:
    """Image channels of a model; ``in_channels`` of other backbones may belong to an inner layer."""
    mean = normalization(model)[1]
    return model.backbone.in_channels if isinstance(model.backbone, StripMLP) else len(mean) if mean else 3


def _shape_of(network: Network, steps: list[dict], settings: Export) -> tuple[int, int]:
    default = (_DEFAULT_SIDE, _DEFAULT_SIDE)
    if network.task == 'segmentor':
        default = tuple(network.model.data_preprocessor.size or default)
    shape = settings.shape or size_of(steps, network.task == 'detector') or default
    least, most = DYNAMIC_SIDES if settings.dynamic_size else (32, float('inf'))
    if not least <= min(shape) <= max(shape) <= most:
        limits = f'from {least} to {most}' if settings.dynamic_size else f'at least {least}'
        raise ValueError(f'sides of --shape must be {limits} pixels, but got {shape[0]} {shape[1]}')
    own = size_of(steps)
    if own and settings.part == 'whole' and not (settings.dynamic_size or fits(own, shape, network.task)):
        raise ValueError(
            f'--shape must be {own[0]} {own[1]}, the size of images after the test pipeline, '
            f'but got {shape[0]} {shape[1]}'
        )
    return shape


def _threshold(network: Network) -> float | None:
    """Threshold of a one-channel segmentor or of a detector's masks."""
    if network.task == 'detector':
        return network.model.test_cfg.rcnn.mask_thr_binary if network.model.with_mask else None
    return getattr(getattr(network.model, 'decode_head', None), 'threshold', None)


def _images(about: dict, batch: int, shape: Sequence[int], spot: int = 1) -> Tensor:
    """Random images with spots of that many pixels, in which detectors find more than in noise."""
    generator = torch.Generator().manual_seed(spot)
    values = torch.randn(batch, about['channels'], *(max(side // spot, 2) for side in shape), generator=generator)
    images = 1.5 * F.interpolate(values, tuple(shape), mode='bicubic')
    return (128 + 64 * images).clamp(0, 255).byte() if about['normalize'] else images


def check(network: nn.Module, session: Session, about: dict) -> float | None:
    """Largest difference between a file's outputs and PyTorch's; see :func:`export_model`.

    With dynamic batches, 1, 2 and 3 images are compared; with dynamic sizes, three more sizes; for detectors, three
    images.
    """
    (height, width), least = about['shape'], DYNAMIC_SIDES[0]
    batches = (1, 2, 3) if about['dynamic_batch'] else (1,)
    cases = [(batch, (height, width), 1) for batch in batches]
    if about['dynamic_size']:
        sizes = (height + 32, width), (max(height // 2, least), width + 45), (least, 2 * width)
        cases += [(batches[-1], size, 1) for size in sizes]
    if about['task'] == 'detector':
        cases = [(1, (height, width), spot) for spot in (4, 8, 16)]
    errors = []
    for batch, size, spot in cases:
        images = _images(about, batch, size, spot)
        with torch.no_grad():
            expected = network(images)
        found = session(images.numpy())
        if about['task'] == 'detector':
            boxes = detections_of([output[0] for output in found], about, size, size)
            errors.append(disagreement(boxes, values_of(expected[0]), max(size)))
        else:
            errors += [_difference(*pair) for pair in zip(found, expected, strict=True)]
    errors = [error for error in errors if error is not None]
    return float(np.max(errors)) if errors else None  # NaN if any is NaN


def _difference(found: np.ndarray, expected: Tensor) -> float:
    difference = np.abs(found - expected.numpy()).max() if found.shape == expected.shape else np.inf
    return float(difference / expected.abs().max().clamp(min=_TINY))
