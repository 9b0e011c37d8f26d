"""What docs/deployment.md says that each format can do, of the smallest Strip-MLP; exporting compares with PyTorch."""

import io
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
PROMISES = ('dynamic_batch', 'dynamic_size', 'half')


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
