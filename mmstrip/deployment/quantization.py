"""Exported files in int8, by NNCF's post-training static quantization."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..utils.config import leaf_datasets
from ..utils.samples import read_sample
from .description import read_about
from .formats import HALF_FORMATS, SUFFIXES, check_format, check_packages, store, without_warnings, written_atomically
from .predictor import Predictor

_COMPARED = 16  # images to compare before and after


def calibration_pixels(config: Config, count: int) -> list[np.ndarray]:
    """Up to ``count`` random training images of a config after its test pipeline: (3, H, W), BGR in uint8.

    Raises:
        ValueError: The config lacks the training or the test set.
    """
    init_default_scope(config.get('default_scope') or 'mmengine')
    train, test = (
        [leaf for _, leaf in leaf_datasets(config, f'{key}.dataset')] for key in ('train_dataloader', 'test_dataloader')
    )
    if not train or not test:
        raise ValueError(
            'calibration images need train_dataloader and test_dataloader, but the config lacks one of them'
        )
    datasets = [DATASETS.build({**leaf, 'pipeline': test[0].pipeline}) for leaf in train]
    places = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
    chosen = np.random.default_rng(0).permutation(len(places))[:count]
    return [read_sample(*places[i])['inputs'].numpy() for i in chosen]


def quantize(path: str | Path, out: str | Path, pixels: Sequence[np.ndarray]) -> float:
    """Write an exported file in int8.

    Args:
        path: ONNX or OpenVINO file with float32 weights.
        out: File of the same format to write, atomically.
        pixels: Calibration images; see :func:`calibration_pixels`.

    Returns:
        Root mean square difference of the outputs from those of ``path``, relative to their root mean square.

    Raises:
        FileNotFoundError: The file or the folder of ``out`` is missing.
        ValueError: NNCF is not installed, the file cannot be quantized, or it takes images of other sizes.
    """
    if Path(path).suffix == SUFFIXES['torch-export']:
        raise ValueError(f'only {" and ".join(HALF_FORMATS)} files can be quantized, but got {path}')
    about = read_about(path)
    if about['task'] == 'detector':
        raise ValueError(f'classifiers, segmentors, backbones and necks can be quantized, but {path} is a detector')
    check_format(about['format'], out)
    check_packages('int8')
    if about['half'] or about.get('int8'):
        raise ValueError(f'{path} must have float32 weights, but has {"float16" if about["half"] else "int8"}')
    before = Predictor(path)
    inputs = [before.inputs(image[None]) for image in pixels]
    with written_atomically(out) as made:
        write_int8(path, made, inputs, json.dumps({**about, 'int8': True}))
        after = Predictor(made)
        return _distance([[model.run(image[None])[0] for model in (after, before)] for image in pixels[:_COMPARED]])


def write_int8(path: str | Path, out: Path, inputs: Sequence[np.ndarray], about: str = '') -> None:
    """Write an ONNX or OpenVINO file in int8: weights with one scale per channel, activations with one per tensor.

    ``inputs`` calibrate it, and ``about`` is its description as JSON.
    """
    import nncf

    if out.suffix == SUFFIXES['onnx']:
        from onnx import load
    else:
        from openvino import Core

        load = Core().read_model
    with without_warnings():
        nncf.set_log_level(logging.ERROR)
        quantized = nncf.quantize(
            load(path),
            nncf.Dataset([{'images': images} for images in inputs]),
            subset_size=len(inputs),
            # 7-bit weights: with 8 bits, sums overflow on AVX2 and on AVX-512 without VNNI.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix='enable'),
        )
    store(quantized, out, about)


def _distance(pairs: Sequence[Sequence[np.ndarray]]) -> float:
    """Relative root mean square difference; pairs may differ in size."""
    apart = sum(np.sum((found - expected) ** 2, dtype=np.float64) for found, expected in pairs)
    return float(np.sqrt(apart / sum(np.sum(expected**2, dtype=np.float64) for _, expected in pairs)))
