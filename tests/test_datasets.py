"""Splits that are the same everywhere, and image files that cannot be read."""

import os

import numpy as np
import pytest
from helpers import ROOT, run_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from sklearn.datasets import load_digits

from mmstrip.datasets import LoadImage
from mmstrip.datasets.caltech101 import NUM_CLASSES, NUM_IMAGES, split_caltech101


class TestDigits:
    @staticmethod
    def build(split, **arguments):
        init_default_scope('mmpretrain')
        return DATASETS.build(dict(type='mmstrip.Digits', split=split, **arguments))

    def test_split_is_fixed_and_stratified(self):
        train, test = self.build('train'), self.build('test')
        assert (len(train), len(test)) == (1437, 360)
        counts = np.bincount(test.get_gt_labels())
        assert counts.min() >= 35 and counts.max() <= 37
        ids = [{dataset.get_data_info(i)['img_path'] for i in range(len(dataset))} for dataset in (train, test)]
        assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 1797
        assert [test.get_data_info(i)['img_path'] for i in (0, 1, 2, -1)] == [
            'digit_0021',
            'digit_0024',
            'digit_0028',
            'digit_1791',
        ]

    def test_images_are_scikit_learns(self):
        info = self.build('train').get_data_info(5)
        digits = load_digits()
        index = int(info['img_path'].removeprefix('digit_'))
        assert info['img'].shape == (8, 8, 3) and info['img'].dtype == np.uint8
        np.testing.assert_allclose(info['img'][..., 1] * (16 / 255), digits.images[index], atol=0.04)
        assert info['gt_label'] == digits.target[index]

    def test_other_splits_are_refused(self):
        with pytest.raises(ValueError, match="split must be 'train' or 'test', but got 'val'"):
            self.build('val')


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


class TestCaltech101:
    def test_split(self, caltech):
        split = split_caltech101(caltech)
        train, test = ({path for path, _ in split[part]} for part in ('train', 'test'))
        assert len(train) + len(test) == len(train | test) == NUM_IMAGES
        assert not any('BACKGROUND' in path for path in train | test)
        for index in range(NUM_CLASSES):
            counts = [sum(label == index for _, label in split[part]) for part in ('train', 'test')]
            assert counts[0] == int(0.8 * sum(counts))
        assert split == split_caltech101(caltech)

    def test_split_is_the_same_everywhere(self, caltech):
        """The first test images of the seed; a change here would make results incomparable."""
        first = [path for path, label in split_caltech101(caltech)['test'] if label == 0][:4]
        assert first == [f'class_000/image_{i:04d}.jpg' for i in (2, 12, 13, 17)]

    def test_config_reads_what_the_tool_writes(self, caltech):
        done = run_tool('dataset_converters/caltech101.py', caltech)
        assert done.returncode == 0, done.stdout
        assert 'classes.txt: 101 lines' in done.stdout
        config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_caltech101.py')
        init_default_scope('mmpretrain')
        for loader, share in ((config.train_dataloader, 0.8), (config.val_dataloader, 0.2)):
            loader.dataset.data_root = str(caltech)
            dataset = DATASETS.build(loader.dataset)
            assert len(dataset) == pytest.approx(share * NUM_IMAGES, rel=0.05)
            assert len(dataset.metainfo['classes']) == config.model.head.num_classes == NUM_CLASSES
            assert dataset[0]['inputs'].shape == (3, 224, 224)

    def test_missing_split(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='write the split with .*caltech101.py'):
            DATASETS.build(dict(type='mmstrip.Caltech101', data_root=str(tmp_path)))

    def test_wrong_folders(self, caltech, tmp_path):
        with pytest.raises(FileNotFoundError, match='must hold 101_ObjectCategories/'):
            split_caltech101(tmp_path)
        (tmp_path / '101_ObjectCategories' / 'ant').mkdir(parents=True)
        with pytest.raises(ValueError, match='101 classes and 8,677 images .* but has 1 classes and 0 images'):
            split_caltech101(tmp_path)
        failed = run_tool('dataset_converters/caltech101.py', tmp_path)
        assert failed.returncode == 1 and failed.stdout.strip().split('\n')[-1].startswith('Error: ')


class TestBrokenImages:
    """The error names the file, whatever is wrong with it."""

    @pytest.mark.parametrize('content', [b'', b'not an image', b'\xff\xd8\xff\xe0 broken'])
    def test_content(self, content, tmp_path):
        path = tmp_path / 'broken.jpg'
        path.write_bytes(content)
        for backend in ('cv2', 'pillow'):
            with pytest.raises(ValueError, match='broken.jpg is not a readable image'):
                LoadImage(imdecode_backend=backend)(dict(img_path=str(path)))

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='no image file at .*gone.jpg'):
            LoadImage()(dict(img_path=str(tmp_path / 'gone.jpg')))

    def test_inside_a_dataset(self, tmp_path):
        (tmp_path / 'cat').mkdir()
        (tmp_path / 'cat' / 'bad.jpg').write_bytes(b'nothing')
        init_default_scope('mmpretrain')
        config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py')
        dataset = DATASETS.build(
            dict(type='CustomDataset', data_root=str(tmp_path), pipeline=config.train_dataloader.dataset.pipeline)
        )
        with pytest.raises(ValueError, match='bad.jpg is not a readable image'):
            dataset[0]

    def test_good_images_load(self, tmp_path):
        Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / 'good.png')
        results = LoadImage()(dict(img_path=str(tmp_path / 'good.png')))
        assert results['img'].shape == (5, 7, 3) and results['ori_shape'] == (5, 7)
