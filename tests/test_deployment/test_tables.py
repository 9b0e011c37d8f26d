"""What the tables of docs/deployment.md promise, on the smallest networks; exporting compares with PyTorch."""

import re

import numpy as np
import pytest
from helpers import ROOT, table
from helpers.exports import CLASSES, DETECTORS, OPTIONS, SCENES, SMALL_SCENES, write_checkpoint
from helpers.runs import CONFIG

from mmstrip.deployment import Export, export_model, load
from mmstrip.deployment.formats import HALVED, SUFFIXES
from mmstrip.utils.config import load_config

PAGE = ROOT / 'docs' / 'deployment.md'
ANY = dict(dynamic_batch=True, dynamic_size=True)
PADS = {  # before a whole model
    'model.data_preprocessor.test_cfg': dict(size=(96, 96)),
    'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile'), dict(type='Pad', size=(96, 96))],
}
# Of each row of the first table: a config, its options, and how it is exported.
MODELS = {
    'classifier of mmpretrain': (str(CONFIG), {}, dict(scores=True)),  # of any size below
    'segmentor of mmseg, tested whole': (SCENES, SMALL_SCENES, dict(ANY, format='openvino', shape=(64, 96))),
    'any, `--features`': (SCENES, {**SMALL_SCENES, **PADS}, dict(ANY, part='backbone', shape=(80, 112))),
    'any, `--neck`': (DETECTORS['RetinaNet'], OPTIONS['RetinaNet'], dict(part='neck', shape=(64, 96))),
}
ELSEWHERE = {'detector of mmdet, by mmdeploy'}  # in test_detectors.py


def export(row, path):
    config, options, settings = MODELS[row]
    settings = Export(**settings)
    checkpoint = write_checkpoint(load_config(config, options), path / 'weights.pth')
    out = path / f'out{SUFFIXES[settings.format]}'
    assert export_model(config, checkpoint, out, settings, options) < 1e-5
    return load(out)


@pytest.fixture(scope='module')
def maps(tmp_path_factory):
    """Of a backbone at any size, in one graph, below, at and above the size of its windows."""
    return export('any, `--features`', tmp_path_factory.mktemp('maps'))


def test_each_model_is_exported(maps, tmp_path_factory):
    rows = {row[0]: row[1] for row in table(PAGE, 'model')}
    assert rows.keys() == MODELS.keys() | ELSEWHERE
    for row in MODELS:
        predict = maps if 'features' in row else export(row, tmp_path_factory.mktemp('row'))
        outputs = predict.about['outputs']
        assert set(outputs[:2]) <= set(re.findall('`(.*?)`', rows[row])), row
        shape = (64, 64) if predict.about['dynamic_size'] else predict.about['shape']
        assert len(predict.run(np.zeros((1, 3, *shape), np.uint8))) == len(outputs)


def test_maps_of_any_size(maps):
    assert maps.about['classes'] == ['background', *'0123456789'] and maps.about['steps'] == []
    taken = []
    first = next(maps.outputs((taken.append(i) or np.zeros((3, 64, 64), np.uint8) for i in range(9)), 2))
    assert len(first) == 4 and len(taken) == 3  # images, of which the third begins another batch
    for height, width in ((64, 64), (65, 200), (128, 64)):
        shapes = [found.shape[2:] for found in maps.run(np.zeros((3, 3, height, width), np.uint8))]
        assert shapes == [(height // stride, width // stride) for stride in (4, 8, 16, 32)]
    with pytest.raises(ValueError, match='takes sides of 64 to 8192 pixels, but got 63 x 64'):
        maps.run(np.zeros((1, 3, 63, 64), np.uint8))


PROMISES = ('dynamic_batch', 'dynamic_size', 'half')


@pytest.mark.parametrize('row', table(PAGE, '`--format`'), ids=lambda row: row[0])
def test_each_format_can_do_what_it_says(row, tmp_path):
    """All at once, of a classifier with names of classes."""
    form, suffix, _, *cells = row
    form, promised = form.strip('`'), dict(zip(PROMISES, cells, strict=False))
    assert set(promised.values()) <= {'yes', 'no'} and cells[-1] == 'yes' and SUFFIXES[form] in suffix
    checkpoint = write_checkpoint(load_config(str(CONFIG)), tmp_path / 'weights.pth', CLASSES)
    out = tmp_path / f'out{SUFFIXES[form]}'
    for name in PROMISES:
        if promised[name] == 'no':
            with pytest.raises(ValueError, match=f'but the format is {form}'):
                export_model(str(CONFIG), checkpoint, out, Export(form, **{name: True}))
    settings = {name: promised[name] == 'yes' for name in PROMISES}
    error = export_model(str(CONFIG), checkpoint, out, Export(form, normalize=True, shape=(64, 96), **settings))
    assert error < (2e-2 if form in HALVED else 1e-5)
    predict = load(out, trusted=form == 'torch-export')
    pictures = [np.full((*size, 3), 90, np.uint8) for size in ((64, 96), (64, 96), (128, 64))]
    assert [result['pred_class'] in CLASSES for result in predict(pictures, batch_size=2)] == [True] * 3
    assert predict.session(np.zeros((2, 3, 64, 80), np.uint8))[0].shape == (2, 10)
