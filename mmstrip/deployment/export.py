"""From a config and a checkpoint to a file that runs without them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from .. import ops
from ..models import StripMLP
from ..utils.checkpoints import load_full_checkpoint
from ..utils.config import dataset_class, leaf_datasets, load_config
from ..version import __version__
from . import any_size
from .description import check_about
from .detections import detections_of, disagreement, values_of
from .formats import DYNAMIC_SIDES, check_format, write, written_whole
from .mmdeploy import check_detector
from .preprocessing import fits, size_of, steps_of
from .runtimes import Session, open_session

TOLERANCES = {False: 1e-4, True: 2e-2}  # of outputs, relative to the largest: in float32, with weights in float16
_DEFAULT_SIDE = 224
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Export:
    """How to export.

    Attributes:
        format: One of :data:`.formats.SUFFIXES`.
        part: 'whole', a classifier's logits, a segmentor's at the size of its input, or a detector's boxes;
            'backbone', its maps, or 'neck', maps of the neck after it.
        shape: Height and width, pixels; None: those of the test pipeline's crop or fixed size, of detectors its scale,
            of segmentors else the ``size`` of their ``data_preprocessor``, else 224.
        dynamic_batch, dynamic_size: See :func:`.formats.trace`. Without them the batch is 1.
        opset, half: See :func:`.formats.to_onnx` and :func:`.formats.halve`.
        normalize: Take pixels, BGR in uint8, and normalise them in the graph.
        scores: Give a classifier's scores instead of logits.
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
    """What goes into a file: images (N, C, H, W) to a tuple of outputs.

    Args:
        model: A toolbox's model, in evaluation mode.
        task: 'classifier', 'segmentor' or 'detector', or 'backbone' or 'neck', which are parts of any.
        normalize: See :class:`Export`.
        scores: See :class:`Export`.
    """

    def __init__(self, model: nn.Module, task: str, normalize: bool = False, scores: bool = False):
        super().__init__()
        self.model, self.task, self.normalize, self.scores = model, task, normalize, scores
        self.flip, mean, std = normalisation(model)
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
        """Of one image, mmdet's results; tensors while mmdeploy traces: see :mod:`.mmdeploy`."""
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
    """What a model's preprocessing pads the sides of images to multiples of in tests, and with which value."""
    before = model.data_preprocessor
    if hasattr(before, 'test_cfg'):  # mmseg's
        return (before.test_cfg or {}).get('size_divisor', 1), before.pad_val
    return before.pad_size_divisor, before.pad_value


def _pad(images: Tensor, divisor: int, value: float) -> Tensor:
    """On the right and at the bottom."""
    height, width = images.shape[2:]
    return images if divisor == 1 else F.pad(images, (0, -width % divisor, 0, -height % divisor), value=value)


def _cropped(logits: Tensor, images: Tensor) -> Tensor:
    """Without what was padded; by copies, as a view would tie a program of PyTorch to sizes that are padded."""
    for dim in (2, 3):
        logits = logits.index_select(dim, torch.arange(images.shape[dim], device=images.device))
    return logits


def normalisation(model: nn.Module) -> tuple[bool, list[float] | None, list[float] | None]:
    """Whether a model's preprocessing turns BGR to RGB, and its mean and standard deviation, if it has them."""
    before = model.data_preprocessor
    flip = bool(getattr(before, 'to_rgb', False) or getattr(before, '_channel_conversion', False))
    mean, std = (getattr(before, name, None) for name in ('mean', 'std'))
    return flip, *(None if values is None else values.flatten().tolist() for values in (mean, std))


def check_padding(model: nn.Module) -> None:
    """Whether a whole model's preprocessing does what exported files do.

    Raises:
        ValueError: It pads images in tests to a size of its own, or a classifier's.
    """
    before = model.data_preprocessor
    if getattr(before, 'pad_size_divisor', 1) > 1 and type(before).__name__ == 'ClsDataPreprocessor':
        raise ValueError('model.data_preprocessor.pad_size_divisor must be 1 to be exported')
    if (getattr(before, 'test_cfg', None) or {}).get('size'):
        raise ValueError('model.data_preprocessor.test_cfg.size pads images, which exported files do not: leave it out')


def task_of(model: nn.Module, part: str) -> str:
    """What of a model is exported; see :class:`Network`.

    Raises:
        ValueError: It cannot be exported, or has no such part.
    """
    name = type(model).__name__
    if part != 'whole':
        if getattr(model, part, None) is None:
            raise ValueError(f'{name} has no {part} to be exported')
        return part
    if _is_a(model, 'mmpretrain', 'ImageClassifier'):
        kind, base = type(model.head), _is_a(model.head, 'mmpretrain', 'ClsHead')
        if not base or any(getattr(kind, name) is not getattr(base, name) for name in ('predict', '_get_predictions')):
            raise ValueError(f'classifiers of one label are exported, but the head is {kind.__name__}')
        return 'classifier'
    if _is_a(model, 'mmseg', 'EncoderDecoder'):
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise ValueError(
                "segmentors are exported whole, but model.test_cfg.mode is 'slide': "
                '--cfg-options model.test_cfg.mode=whole'
            )
        return 'segmentor'
    if _is_a(model, 'mmdet', 'SingleStageDetector') or _is_a(model, 'mmdet', 'TwoStageDetector'):
        return 'detector'
    raise ValueError(f'{name} cannot be exported whole: export its --features, or its backbone and --neck')


def _is_a(module: nn.Module, package: str, name: str) -> type | None:
    """The toolbox's class of that name that a module is of, if it is, without importing the toolbox."""
    kinds = (kind for kind in type(module).mro() if kind.__module__.startswith(f'{package}.'))
    return next((kind for kind in kinds if kind.__name__ == name), None)


def export_model(
    config: str, checkpoint: str, out: str | Path, settings: Export, options: dict | None = None, trusted: bool = False
) -> float | None:
    """Export a trained model, and compare the file in its runtime with PyTorch.

    Args:
        config: Config file of a toolbox.
        checkpoint: Checkpoint that fills the model.
        out: File to write, atomically.
        settings: How.
        options: Overrides of the config, as of ``--cfg-options``.
        trusted: Run the code that ``checkpoint`` may ask for. Defaults to False.

    Returns:
        The largest difference of an output, relative to the largest value; of a detector, of a score, or of a side
        relative to the picture's larger one, or None if it finds nothing in random pictures.

    Raises:
        FileNotFoundError: The config or the checkpoint is missing, or the folder of ``out``.
        ValueError: Something cannot be exported as asked, or the outputs differ by more than :data:`TOLERANCES`;
            then nothing is written.
    """
    check_format(settings.format, out, settings.half, settings.opset)
    loaded = load_config(config, options)
    if not loaded.get('model'):
        raise ValueError(f'{config} has no model to be exported')
    init_default_scope(loaded.get('default_scope', 'mmengine'))
    if loaded.get('data_preprocessor'):
        loaded.model.setdefault('data_preprocessor', loaded.data_preprocessor)  # as mmengine's Runner does
    with torch.random.fork_rng(devices=()):
        model = MODELS.build(loaded.model).eval().requires_grad_(False)
    task = task_of(model, settings.part)
    if settings.part == 'whole':
        check_padding(model)
    if settings.scores and task != 'classifier':
        raise ValueError(f'--scores are of classifiers, but of {config} a {task} is exported')
    if task == 'detector':
        check_detector(settings.format, settings.dynamic_batch or settings.dynamic_size)
    meta = load_full_checkpoint(model, config, checkpoint, trusted).get('meta') or {}
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
        with written_whole(out) as made:
            write(made, network, images, about)
            error = check(network, open_session(made, trusted=True), about)
            if error is not None and not error < TOLERANCES[settings.half]:
                raise ValueError(
                    f'{out}: outputs differ by {error:.1e} of the largest from those of PyTorch, where '
                    f'{TOLERANCES[settings.half]:.0e} is allowed; nothing was written'
                )
    return error


def _output_names(network: Network, images: Tensor) -> list[str]:
    if network.task == 'detector':
        return ['boxes', 'labels', *(['masks'] if network.model.with_mask else [])]
    if network.task in ('backbone', 'neck'):
        return [f'map{i}' for i in range(len(network(images)))]
    return ['scores' if network.scores else 'logits']


def _describe(network: Network, config, settings: Export, meta: dict) -> dict:
    """What a file says of itself: all that a prediction needs."""
    data = leaf_datasets((config.get('test_dataloader') or {}).get('dataset'), 'test_dataloader.dataset')
    _, dataset = next(data, (None, {}))
    steps = _steps_of(dataset, settings.part)
    flip, mean, std = normalisation(network.model)
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
    """Of a test set's pipeline; none before a part of a model, where there are others than whole models take."""
    try:
        return steps_of(dataset.get('pipeline') or [])
    except ValueError:
        if part == 'whole':
            raise
        return []


def _classes_of(model: nn.Module, meta: dict, dataset: dict) -> list[str] | None:
    """From what is beside the weights, else of the test set where a head has as many."""
    stored = (meta.get('dataset_meta') or {}).get('classes')
    if stored is not None:
        return list(stored)
    known = dict(getattr(dataset_class(dataset), 'METAINFO', {}) if dataset else {})
    names = dataset.get('classes') or {**known, **(dataset.get('metainfo') or {})}.get('classes')
    counts = {getattr(module, 'num_classes', None) for module in model.modules()}
    return list(names) if isinstance(names, (list, tuple)) and len(names) in counts else None


def channels_of(model: nn.Module) -> int:
    """Channels of a model's images; other backbones' ``in_channels`` may be those of a layer within."""
    mean = normalisation(model)[1]
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
            f'--shape must be {own[0]} {own[1]}, the size that the test pipeline gives all pictures, '
            f'but got {shape[0]} {shape[1]}'
        )
    return shape


def _threshold(network: Network) -> float | None:
    """From which on a segmentor of one class, or a detector's mask, has it."""
    if network.task == 'detector':
        return network.model.test_cfg.rcnn.mask_thr_binary if network.model.with_mask else None
    return getattr(getattr(network.model, 'decode_head', None), 'threshold', None)


def _images(about: dict, batch: int, shape: Sequence[int], spot: int = 1) -> Tensor:
    """Random images as a file takes them, with spots of so many pixels: a detector finds more in them than in noise."""
    generator = torch.Generator().manual_seed(spot)
    values = torch.randn(batch, about['channels'], *(max(side // spot, 2) for side in shape), generator=generator)
    images = 1.5 * F.interpolate(values, tuple(shape), mode='bicubic')
    return (128 + 64 * images).clamp(0, 255).byte() if about['normalize'] else images


def check(network: nn.Module, session: Session, about: dict) -> float | None:
    """Largest difference of a file's outputs from PyTorch's, as :func:`export_model` returns it.

    Compared are batches of 1, 2 and 3, and three more sizes, where they are dynamic; of detectors, three pictures.
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
    return float(np.max(errors)) if errors else None  # not a number if one is none


def _difference(found: np.ndarray, expected: Tensor) -> float:
    difference = np.abs(found - expected.numpy()).max() if found.shape == expected.shape else np.inf
    return float(difference / expected.abs().max().clamp(min=_TINY))
