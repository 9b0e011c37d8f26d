"""What the tables of docs/deployment.md promise, on the smallest networks; exporting compares with PyTorch."""

import io
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, table
from helpers.exports import CLASSES
from helpers.runs import CONFIG

from mmstrip.deployment import Export, export_model, formats, load
from mmstrip.deployment.formats import HALF_FORMATS, SUFFIXES

PAGE = ROOT / 'docs' / 'deployment.md'
# The exports of the rows of the first table; whole detectors are tested in test_detectors.py.
MODELS = {
    'mmpretrain classifier': 'classifier',
    'mmseg segmentor, whole mode': 'segmentor',
    'mmdet detector, through mmdeploy': None,
    'any model, `--features`': 'maps',
    'any model, `--neck`': 'neck',
}
PROMISES = ('dynamic_batch', 'dynamic_size', 'half')


def test_each_model_is_exported(exported):
    rows = {row[0]: row[1] for row in table(PAGE, 'model')}
    assert rows.keys() == MODELS.keys()
    for row, name in MODELS.items():
        if name:
            predict = load(exported(name))
            outputs = predict.about['outputs']
            assert set(outputs[:2]) <= set(re.findall('`(.*?)`', rows[row])), row
            assert len(predict.run(np.zeros((1, 3, *predict.about['shape']), np.uint8))) == len(outputs)


def test_maps_of_any_size(exported):
    """Of a backbone, in one graph, below, at and above the size of its windows."""
    maps = load(exported('maps'))
    assert maps.about['classes'] == ['background', *'0123456789'] and maps.about['steps'] == []
    taken = []
    first = next(maps.outputs((taken.append(i) or np.zeros((3, 64, 64), np.uint8) for i in range(9)), 2))
    assert len(first) == 4 and len(taken) == 2  # images
    for height, width in ((64, 64), (65, 200), (128, 64)):
        shapes = [found.shape[2:] for found in maps.run(np.zeros((3, 3, height, width), np.uint8))]
        assert shapes == [(height // stride, width // stride) for stride in (4, 8, 16, 32)]
    with pytest.raises(ValueError, match='takes sides of 64 to 8192 pixels, but got 63 x 64'):
        maps.run(np.zeros((1, 3, 63, 64), np.uint8))


@pytest.fixture(scope='module')
def traced_once():
    """A model at any size takes half a minute to trace; each format writes the same program."""
    trace, saved = formats.trace, io.BytesIO()

    def trace_once(*arguments):
        if not saved.getvalue():
            torch.export.save(trace(*arguments), saved)
        return torch.export.load(io.BytesIO(saved.getvalue()))  # as what writes a program changes it

    with mock.patch.object(formats, 'trace', trace_once):
        yield


@pytest.mark.parametrize('row', table(PAGE, '`--format`'), ids=lambda row: row[0])
def test_each_format_can_do_what_it_says(row, checkpoint, traced_once, tmp_path):
    """All at once, of a classifier with names of classes."""
    form, suffix, _, *cells = row
    form, promised = form.strip('`'), dict(zip(PROMISES, cells, strict=False))
    assert set(promised.values()) <= {'yes', 'no'} and cells[-1] == 'yes' and SUFFIXES[form] in suffix
    out = tmp_path / f'out{SUFFIXES[form]}'
    for name in PROMISES:
        if promised[name] == 'no':
            with pytest.raises(ValueError, match=f'but the format is {form}'):
                export_model(str(CONFIG), checkpoint, out, Export(form, **{name: True}))
    settings = {name: promised[name] == 'yes' for name in PROMISES}
    options = {'test_dataloader.dataset.pipeline': []}  # or pictures become smaller than any size goes
    settings = Export(form, normalize=True, shape=(64, 96), **settings)
    error = export_model(str(CONFIG), checkpoint, out, settings, options)
    assert error < (2e-2 if form in HALF_FORMATS else 1e-5)
    predict = load(out, trusted=form == 'torch-export')
    pictures = [np.full((*size, 3), 90, np.uint8) for size in ((64, 96), (64, 96), (128, 64))]
    assert [result['pred_class'] in CLASSES for result in predict(pictures, batch_size=2)] == [True] * 3
    assert predict.session(np.zeros((2, 3, 64, 80), np.uint8))[0].shape == (2, 10)
    if form == 'onnx':
        assert out.stat().st_size < 0.65 * Path(checkpoint).stat().st_size
