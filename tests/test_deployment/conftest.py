"""Models and what they are exported to, each once for the tests of all files."""

import functools

import numpy as np
import pytest
from helpers.exports import EXPORTS, write_checkpoint, write_detector
from PIL import Image

from mmstrip.deployment import Export, export_model
from mmstrip.deployment.formats import SUFFIXES
from mmstrip.utils.config import load_config


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    """The file of a row of ``EXPORTS``, beside its checkpoint; the export finds it equal to PyTorch."""

    @functools.cache
    def export(name):
        folder = tmp_path_factory.mktemp(name)
        config, options, settings, classes = EXPORTS[name]
        checkpoint = write_checkpoint(load_config(config, options), folder / 'weights.pth', classes)
        settings = Export(**settings)
        out = folder / f'small{SUFFIXES[settings.format]}'
        assert export_model(config, checkpoint, out, settings, options) < (2e-2 if settings.half else 1e-5)
        return out

    return export


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    """The file of a detector, beside its config and checkpoint."""

    @functools.cache
    def export(name, form='onnx', **options):
        folder = tmp_path_factory.mktemp(name)
        out = folder / f'small{SUFFIXES[form]}'
        assert export_model(*write_detector(name, folder), out, Export(form, **options)) < 1e-5
        return out

    return export


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    """A picture's path, and arrays as OpenCV has them."""
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((70, 100), (70, 100), (64, 32))]
    path = tmp_path_factory.mktemp('pictures') / 'picture.png'
    Image.fromarray(arrays[0][..., ::-1]).save(path)
    return [path, *arrays[1:]]


@pytest.fixture(scope='session')
def checkpoint(exported):
    """Of the small classifier of digits."""
    return str(exported('classifier').with_name('weights.pth'))
