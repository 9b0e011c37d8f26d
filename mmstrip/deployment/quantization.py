"""Exported files in int8, by NNCF's static quantisation after training."""

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
from .formats import HALVED, SUFFIXES, check_format, check_packages, quietly, store, written_whole
from .predictor import Predictor

_COMPARED = 16  # images, before and after


def calibration_pixels(config: Config, count: int) -> list[np.ndarray]:
    """Training images of a config, drawn at random, as its tests see them: (3, H, W), BGR in uint8.

    Args:
        config: A whole config.
        count: How many, at most.

    Raises:
        ValueError: The config has no data sets for training and tests.
    """
    init_default_scope(config.get('default_scope') or 'mmengine')
    train, test = (
        [leaf for _, leaf in leaf_datasets((config.get(key) or {}).get('dataset'), key)]
        for key in ('train_dataloader', 'test_dataloader')
    )
    if not train or not test:
        raise ValueError(
            'images for calibration come from train_dataloader and test_dataloader, but the config lacks one'
        )
    datasets = [DATASETS.build({**leaf, 'pipeline': test[0].pipeline}) for leaf in train]
    places = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
    chosen = np.random.default_rng(0).permutation(len(places))[:count]
    return [read_sample(*places[i])['inputs'].numpy() for i in chosen]


def quantise(path: str | Path, out: str | Path, pixels: Sequence[np.ndarray]) -> float:
    """Write an exported file in int8.

    Args:
        path: File of ONNX or OpenVINO, with weights in float32.
        out: File of the same format to write, atomically.
        pixels: Images that ranges of activations are measured on, as of :func:`calibration_pixels`.

    Returns:
        How far outputs of these images are from those of ``path``: root mean square, relative to that of the outputs.

    Raises:
        FileNotFoundError: There is no such file, or no folder for ``out``.
        ValueError: NNCF is not installed, or the file is none that can be quantised, or takes images of other sizes.
    """
    if Path(path).suffix == SUFFIXES['torch-export']:
        raise ValueError(f'files of {" and ".join(HALVED)} are quantised, but got {path}')
    about = read_about(path)
    if about['task'] == 'detector':
        raise ValueError(f'classifiers, segmentors, backbones and necks are quantised, but {path} holds a detector')
    check_format(about['format'], out)
    check_packages('int8')
    if about['half'] or about.get('int8'):
        raise ValueError(f'{path} must have weights in float32 to be quantised')
    before = Predictor(path)
    inputs = [before.inputs(image[None]) for image in pixels]
    with written_whole(out) as made:
        write_int8(path, made, inputs, json.dumps({**about, 'int8': True}))
        after = Predictor(made)
        some = pixels[:_COMPARED]
        error = _distance([(after.run(image[None])[0], before.run(image[None])[0]) for image in some])
    return error


def write_int8(path: str | Path, out: Path, inputs: Sequence[np.ndarray], about: str = '') -> None:
    """Write a file in int8: weights with a scale for each channel, activations with one for each tensor.

    Args:
        path: File of ONNX or OpenVINO; of OpenVINO, ``out`` is, too.
        out: File to write, of ONNX or OpenVINO by its ending.
        inputs: What it is calibrated on.
        about: Description, as JSON. Defaults to none.
    """
    import nncf

    if out.suffix == SUFFIXES['onnx']:
        from onnx import load
    else:
        from openvino import Core

        load = Core().read_model
    with quietly():
        nncf.set_log_level(logging.ERROR)
        quantised = nncf.quantize(
            load(path),
            nncf.Dataset([{'images': images} for images in inputs]),
            subset_size=len(inputs),
            # Weights of 7 bits, as the sums of AVX2 and AVX-512 without VNNI overflow with 8.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix='enable'),
        )
    store(quantised, out, about)


def _distance(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of what is found from what is expected, each pair of a size of its own."""
    apart = sum(np.sum((found - expected) ** 2, dtype=np.float64) for found, expected in pairs)
    return float(np.sqrt(apart / sum(np.sum(expected**2, dtype=np.float64) for _, expected in pairs)))
