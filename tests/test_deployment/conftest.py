"""Models and what they are exported to, each once for the tests of all files."""

import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers.exports import EXPORTS, write_checkpoint, write_detector
from PIL import Image

from mmstrip.deployment import Export, export_model
from mmstrip.deployment.formats import SUFFIXES
from mmstrip.utils.config import load_config


def once(tmp_path_factory, name, write):
    """The path that ``write(folder)`` returns, of the first process of a run that asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root
    with FileLock(root / f'{name}.lock'):
        folder, done = root / name, root / f'{name}.done'
        if not done.exists():
            folder.mkdir(exist_ok=True)
            done.write_text(str(write(folder)))
    return Path(done.read_text())


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    """The file of a row of ``EXPORTS``, beside its checkpoint; the export finds it equal to PyTorch."""

    def export(name):
        config, options, settings, classes = EXPORTS[name]
        settings = Export(**settings)

        def write(folder):
            checkpoint = write_checkpoint(load_config(config, options), folder / 'weights.pth', classes)
            out = folder / f'small{SUFFIXES[settings.format]}'
            assert export_model(config, checkpoint, out, settings, options) < (2e-2 if settings.half else 1e-5)
            return out

        return once(tmp_path_factory, name, write)

    return export


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    """The file of a detector, beside its config and checkpoint."""

    def export(name, form='onnx', **options):
        def write(folder):
            out = folder / f'small{SUFFIXES[form]}'
            assert export_model(*write_detector(name, folder), out, Export(form, **options)) < 1e-5
            return out

        return once(tmp_path_factory, ' '.join([name, form, *options]), write)

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
