"""The split of scikit-learn's digits, the same everywhere."""

import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope
from sklearn.datasets import load_digits


def build(split, **arguments):
    init_default_scope('mmpretrain')
    return DATASETS.build(dict(type='mmstrip.Digits', split=split, **arguments))


def test_split_is_fixed_and_stratified():
    train, test = build('train'), build('test')
    assert (len(train), len(test)) == (1437, 360)
    counts = np.bincount(test.get_gt_labels())
    assert counts.min() >= 35 and counts.max() <= 37
    ids = [{dataset.get_data_info(i)['img_path'] for i in range(len(dataset))} for dataset in (train, test)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 1797
    assert [test.get_data_info(i)['img_path'] for i in (0, 1, 2, -1)] == [
        'digit_0021.png',
        'digit_0024.png',
        'digit_0028.png',
        'digit_1791.png',
    ]


def test_images_are_scikit_learns():
    info = build('train').get_data_info(5)
    digits = load_digits()
    index = int(info['img_path'].removeprefix('digit_').removesuffix('.png'))
    assert info['img'].shape == (8, 8, 3) and info['img'].dtype == np.uint8
    np.testing.assert_allclose(info['img'][..., 1] * (16 / 255), digits.images[index], atol=0.04)
    assert info['gt_label'] == digits.target[index]


def test_other_splits_are_refused():
    with pytest.raises(ValueError, match="split must be one of train, test, but got 'val'"):
        build('val')
