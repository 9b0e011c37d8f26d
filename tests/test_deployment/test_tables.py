"""What the tables of docs/deployment.md promise, on the smallest networks; exporting compares with PyTorch."""

import re

import numpy as np
import pytest
from helpers import ROOT, table
from helpers.exports import CLASSES, OPTIONS, SCENES, SMALL_SCENES, write_checkpoint, write_detector
from helpers.runs import CONFIG

from mmstrip.deployment import Export, export_model, load
from mmstrip.deployment.formats import HALVED, SUFFIXES
from mmstrip.utils.config import load_config

PAGE = ROOT / 'docs' / 'deployment.md'
DETECTOR = str(ROOT / 'configs/detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py')
ANY = dict(format='openvino', dynamic_batch=True, dynamic_size=True, shape=(64, 96))
# Of each row of the first table: a config, its options, and how it is exported.
MODELS = {
    'classifier of mmpretrain': (str(CONFIG), {}, dict(scores=True)),  # of any size below
    'segmentor of mmseg, tested whole': (SCENES, SMALL_SCENES, ANY),
    'detector of mmdet, by mmdeploy': None,
    'any, `--features`': (SCENES, SMALL_SCENES, dict(part='backbone', shape=(64, 64))),
    'any, `--neck`': (DETECTOR, OPTIONS['RetinaNet'], dict(ANY, part='neck')),
}


@pytest.mark.parametrize('row', table(PAGE, 'model'), ids=lambda row: row[0])
def test_each_model_is_exported(row, tmp_path):
    """Segmentors and detectors' necks in OpenVINO at any size."""
    if MODELS[row[0]] is None:
        (config, checkpoint), options, settings = write_detector('RetinaNet', tmp_path), None, {}
    else:
        config, options, settings = MODELS[row[0]]
        checkpoint = write_checkpoint(load_config(config, options), tmp_path / 'weights.pth')
    settings = Export(**settings)
    out = tmp_path / f'out{SUFFIXES[settings.format]}'
    assert export_model(config, checkpoint, out, settings, options) < 1e-5
    predict = load(out)
    assert set(predict.about['outputs'][:2]) <= set(re.findall('`(.*?)`', row[1]))
    shape = predict.about['shape'] if not settings.dynamic_size else (64, 64)
    assert len(predict.run(np.zeros((1, 3, *shape), np.uint8))) == len(predict.about['outputs'])


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
