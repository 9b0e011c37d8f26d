"""Splits that are the same everywhere, and image files that cannot be read."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
from helpers import ROOT, run_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from mmstrip.datasets import LoadImage, PlaceDigit
from mmstrip.datasets.caltech101 import NUM_CLASSES, NUM_IMAGES, split_caltech101
from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.datasets.digit_split import split_digits


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


class TestDigitScenes:
    @pytest.fixture(scope='class')
    @staticmethod
    def scenes(tmp_path_factory):
        folder = tmp_path_factory.mktemp('scenes')
        write_digit_scenes(folder, num_train=30, num_val=20)
        return folder

    def test_the_same_seed_gives_the_same_files(self, scenes, tmp_path):
        for name, seed in (('same', 0), ('other', 1)):
            write_digit_scenes(tmp_path / name, num_train=30, num_val=20, seed=seed)
        files = sorted(path.relative_to(scenes) for path in scenes.rglob('*') if path.is_file())
        assert len(files) == 2 * (30 + 20) + 2
        equal = lambda name: [  # noqa: E731
            (scenes / file).read_bytes() == (tmp_path / name / file).read_bytes() for file in files
        ]
        assert all(equal('same')) and not any(equal('other'))

    def test_no_digit_of_val_is_in_train(self, scenes):
        used = {
            split: {annotation['digit_id'] for annotation in self.load(scenes, split)['annotations']}
            for split in ('train', 'val')
        }
        digits = split_digits()
        assert used['train'] and used['train'] <= set(digits['train'][2].tolist())
        assert used['val'] and used['val'] <= set(digits['test'][2].tolist())
        assert not set(digits['train'][2]) & set(digits['test'][2])

    def test_boxes_masks_and_label_maps_agree(self, scenes):
        coco = COCO(str(scenes / 'annotations' / 'val.json'))
        assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == [str(i) for i in range(10)]
        sides, overlaps, counts = [], 0, []
        for image in coco.loadImgs(coco.getImgIds()):
            labels = np.array(Image.open(scenes / 'labels' / 'val' / image['file_name']))
            assert np.array(Image.open(scenes / 'val' / image['file_name'])).shape == (96, 96, 3) == (*labels.shape, 3)
            drawn = np.zeros_like(labels)
            annotations = coco.loadAnns(coco.getAnnIds(image['id']))
            counts.append(len(annotations))
            boxes = []
            for annotation in annotations:
                mask = coco.annToMask(annotation).astype(bool)
                assert not drawn[mask].any() and mask.sum() == annotation['area'] >= 10
                drawn[mask] = annotation['category_id']
                rows, columns = np.where(mask)
                x, y, width, height = annotation['bbox']
                assert (x, y, x + width, y + height) == (
                    columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                )  # fmt: skip
                sides.append(max(width, height))
                boxes.append((x, y, x + width, y + height))
            assert np.array_equal(drawn, labels)
            overlaps += any(
                a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in itertools.combinations(boxes, 2)
            )
        assert min(counts) >= 1 and max(counts) >= 4 and overlaps >= 3
        assert min(sides) < 20 and 40 < max(sides) <= 60

    @staticmethod
    def load(folder, split):
        return json.loads((folder / 'annotations' / f'{split}.json').read_text())

    def test_one_digit_for_a_classifier(self):
        image = np.repeat(split_digits()['train'][0][0][:, :, None], 3, axis=2)
        np.random.seed(0)
        first, second = (PlaceDigit(size=48)(dict(img=image))['img'] for _ in range(2))
        assert first.shape == (48, 48, 3) and first.dtype == np.uint8 and not np.array_equal(first, second)

    def test_wrong_counts_are_refused(self, tmp_path):
        done = run_tool('dataset_converters/digit_scenes.py', tmp_path / 'out', '--val', '0')
        assert done.returncode != 0 and 'num_val must be at least 1, but got 0' in done.stdout
        assert not (tmp_path / 'out').exists()

    def test_broken_annotations_are_named(self, scenes, tmp_path):
        shutil.copytree(scenes, tmp_path / 'data')
        file = tmp_path / 'data' / 'annotations' / 'val.json'
        text = file.read_text()
        for broken, words in (
            (text[: len(text) // 2], 'is not an annotation file as COCO has them (JSONDecodeError'),
            ('{"images": [{"id": 1}]}', 'is not an annotation file as COCO has them'),
            ('[]', 'is not an annotation file as COCO has them'),
            (text.replace('"name": "7"', '"name": "seven"'), 'but only 9 of them are there'),
        ):
            file.write_text(broken)
            with pytest.raises(ValueError) as error:
                self.build('detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py', tmp_path / 'data')
            assert str(file) in str(error.value) and words in str(error.value)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f'no annotation file {file}'):
            self.build('detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py', tmp_path / 'data')

    @staticmethod
    def build(name, data_root):
        config = Config.fromfile(ROOT / 'configs' / name)
        init_default_scope(config.default_scope)
        return DATASETS.build(dict(config.val_dataloader.dataset, data_root=str(data_root)))

    def test_missing_image_is_named(self, scenes, tmp_path):
        shutil.copytree(scenes, tmp_path / 'data')
        (tmp_path / 'data' / 'val' / '00002.png').unlink()
        dataset = self.build('detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py', tmp_path / 'data')
        assert dataset[0]['inputs'].shape == (3, 96, 96)
        with pytest.raises(FileNotFoundError, match='no image file at .*val/00002.png'):
            dataset[1]

    def test_broken_label_maps_are_named(self, scenes, tmp_path):
        shutil.copytree(scenes, tmp_path / 'data')
        dataset = self.build('segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py', tmp_path / 'data')
        file = tmp_path / 'data' / 'labels' / 'val' / '00001.png'
        labels = np.array(Image.open(file))
        assert np.array_equal(dataset[0]['data_samples'].gt_sem_seg.data[0], labels)
        labels[3, 4], labels[5, 6] = 11, 255
        Image.fromarray(labels).save(file)
        with pytest.raises(ValueError, match='val/00001.png must hold labels from 0 to 10, or 255 .* but has 11$'):
            dataset[0]
        Image.fromarray(labels[:50]).save(file)
        with pytest.raises(ValueError, match=r'val/00001.png must be a label map of \(96, 96\) pixels'):
            dataset[0]
        file.write_text('no image')
        with pytest.raises(ValueError, match='val/00001.png is not a readable label map'):
            dataset[0]
        file.unlink()
        with pytest.raises(
            FileNotFoundError, match='no label map .*labels/val/00001.png for the image .*val/00001.png'
        ):
            dataset[0]
