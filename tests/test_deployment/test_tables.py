"""The models that docs/deployment.md says can be exported, the smallest of each; exporting compares with PyTorch."""

import re

import numpy as np
import pytest
from helpers import ROOT, table

from mmstrip.deployment import load

PAGE = ROOT / 'docs' / 'deployment.md'
# The exports of the rows of the first table; whole detectors are tested in test_detectors.py.
MODELS = {
    'mmpretrain classifier': 'classifier',
    'mmseg segmentor, whole mode': 'segmentor',
    'mmdet detector, through mmdeploy': None,
    'any model, `--features`': 'maps',
    'any model, `--neck`': 'neck',
}


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
    """Of a backbone, in one graph."""
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
