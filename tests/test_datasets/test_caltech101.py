"""The split of Caltech-101, the same everywhere."""

import os

import numpy as np
import pytest
from helpers import ROOT
from helpers.runs import run_here
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmstrip.datasets.caltech101 import NUM_CLASSES, NUM_IMAGES, split_caltech101


@pytest.fixture(scope='module')
def caltech(tmp_path_factory):
    """As many classes and images as the real one, all links to one tiny picture."""
    root = tmp_path_factory.mktemp('caltech101')
    picture = root / 'picture.jpg'
    Image.fromarray(np.full((40, 50, 3), 128, np.uint8)).save(picture)
    for index in range(NUM_CLASSES):
        folder = root / '101_ObjectCategories' / f'class_{index:03d}'
        folder.mkdir(parents=True)
        for i in range(NUM_IMAGES // NUM_CLASSES + (index < NUM_IMAGES % NUM_CLASSES)):
            os.link(picture, folder / f'image_{i:04d}.jpg')
    (root / '101_ObjectCategories' / 'BACKGROUND_Google').mkdir()
    os.link(picture, root / '101_ObjectCategories' / 'BACKGROUND_Google' / 'image_0001.jpg')
    return root


def test_split(caltech):
    split = split_caltech101(caltech)
    train, test = ({path for path, _ in split[part]} for part in ('train', 'test'))
    assert len(train) + len(test) == len(train | test) == NUM_IMAGES
    part, held_out = ({path for path, _ in split[part]} for part in ('train-part', 'held-out'))
    assert (
        part | held_out == train and not part & held_out and len(held_out) == pytest.approx(0.2 * len(train), rel=0.05)
    )
    assert not any('BACKGROUND' in path for path in train | test)
    for index in range(NUM_CLASSES):
        counts = [sum(label == index for _, label in split[part]) for part in ('train', 'test')]
        assert counts[0] == int(0.8 * sum(counts))
    assert split == split_caltech101(caltech)


def test_split_is_the_same_everywhere(caltech):
    """The first test images of the seed; a change here would make results incomparable."""
    first = [path for path, label in split_caltech101(caltech)['test'] if label == 0][:4]
    assert first == [f'class_000/image_{i:04d}.jpg' for i in (2, 12, 13, 17)]


def test_config_reads_what_the_tool_writes(caltech, capsys):
    run_here('dataset_converters/caltech101.py', caltech)
    assert 'classes.txt: 101 lines' in capsys.readouterr().out
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_1xb128_caltech101.py')
    init_default_scope('mmpretrain')
    for loader, share in ((config.train_dataloader, 0.8), (config.val_dataloader, 0.2)):
        loader.dataset.data_root = str(caltech)
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == pytest.approx(share * NUM_IMAGES, rel=0.05)
        assert len(dataset.metainfo['classes']) == config.model.head.num_classes == NUM_CLASSES
        assert dataset[0]['inputs'].shape == (3, 224, 224)


def test_missing_split(tmp_path):
    with pytest.raises(FileNotFoundError, match='no split file .*train.txt: write it with .*caltech101.py'):
        DATASETS.build(dict(type='mmstrip.Caltech101', data_root=str(tmp_path)))


def test_wrong_folders(caltech, tmp_path):
    with pytest.raises(FileNotFoundError, match='must contain 101_ObjectCategories/'):
        split_caltech101(tmp_path)
    (tmp_path / '101_ObjectCategories' / 'ant').mkdir(parents=True)
    with pytest.raises(ValueError, match='101 classes and 8,677 images .* but contains 1 classes and 0 images'):
        split_caltech101(tmp_path)
    with pytest.raises(SystemExit, match='^Error: '):
        run_here('dataset_converters/caltech101.py', tmp_path)
