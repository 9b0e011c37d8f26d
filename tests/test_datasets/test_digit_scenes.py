"""Scenes of digits: what is in them, and files of theirs that cannot be read."""

import itertools
import json
import shutil

import numpy as np
import pytest
from helpers import ROOT
from helpers.runs import run_here
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

from mmstrip.datasets import PlaceDigit
from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.datasets.digit_split import split_digits
from mmstrip.utils.samples import read_sample


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes')
    write_digit_scenes(folder, num_train=30, num_val=20)
    return folder


def test_the_same_seed_gives_the_same_files(scenes, tmp_path):
    for name, seed in (('same', 0), ('other', 1)):
        write_digit_scenes(tmp_path / name, num_train=30, num_val=20, seed=seed)
    files = sorted(path.relative_to(scenes) for path in scenes.rglob('*') if path.is_file())
    assert len(files) == 2 * (30 + 20) + 2
    for name in ('same', 'other'):
        equal = {(scenes / file).read_bytes() == (tmp_path / name / file).read_bytes() for file in files}
        assert equal == {name == 'same'}


def test_the_tool_writes_scenes_and_refuses_wrong_counts(tmp_path, capsys):
    options = ['--train', '3', '--size', '64', '--seed', '4']
    run_here('dataset_converters/digit_scenes.py', tmp_path / 'scenes', *options, '--val', '2')
    assert '3 training and 2 validation scenes' in capsys.readouterr().out
    assert len(list(tmp_path.rglob('*.png'))) == 2 * (3 + 2) and len(list(tmp_path.rglob('*.json'))) == 2
    with pytest.raises(SystemExit, match='num_val must be at least 1, but got 0'):
        run_here('dataset_converters/digit_scenes.py', tmp_path / 'none', *options, '--val', '0')
    assert not (tmp_path / 'none').exists()


def test_no_digit_of_val_is_in_train(scenes):
    used = {
        split: {annotation['digit_id'] for annotation in load(scenes, split)['annotations']}
        for split in ('train', 'val')
    }
    digits = split_digits()
    assert used['train'] and used['train'] <= set(digits['train'][2].tolist())
    assert used['val'] and used['val'] <= set(digits['test'][2].tolist())
    assert not set(digits['train'][2]) & set(digits['test'][2])


def test_boxes_masks_and_label_maps_agree(scenes):
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


def load(folder, split):
    return json.loads((folder / 'annotations' / f'{split}.json').read_text())


def test_one_digit_for_a_classifier():
    image = np.repeat(split_digits()['train'][0][0][:, :, None], 3, axis=2)
    np.random.seed(0)
    first, second = (PlaceDigit(size=48)(dict(img=image))['img'] for _ in range(2))
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8 and not np.array_equal(first, second)


def test_broken_annotations_are_named(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / 'data')
    file = tmp_path / 'data' / 'annotations' / 'val.json'
    text = file.read_text()
    for broken, words in (
        (text[: len(text) // 2], 'is not a COCO annotation file (JSONDecodeError'),
        ('{"images": [{"id": 1}]}', 'is not a COCO annotation file'),
        ('[]', 'is not a COCO annotation file'),
        (text.replace('"name": "7"', '"name": "seven"'), 'but contains only 9 of them'),
    ):
        file.write_text(broken)
        with pytest.raises(ValueError) as error:
            build('detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py', tmp_path / 'data')
        assert str(file) in str(error.value) and words in str(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f'no annotation file {file}'):
        build('detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py', tmp_path / 'data')


def build(name, data_root):
    config = Config.fromfile(ROOT / 'configs' / name)
    init_default_scope(config.default_scope)
    return DATASETS.build(dict(config.val_dataloader.dataset, data_root=str(data_root)))


def test_broken_label_maps_are_named(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / 'data')
    dataset = build('segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py', tmp_path / 'data')
    file = tmp_path / 'data' / 'labels' / 'val' / '00001.png'
    labels = np.array(Image.open(file))
    assert np.array_equal(read_sample(dataset, 0)['data_samples'].gt_sem_seg.data[0], labels)
    labels[3, 4], labels[5, 6] = 11, 255
    Image.fromarray(labels).save(file)
    with pytest.raises(ValueError, match='val/00001.png must contain labels from 0 to 10, or 255 .* but contains 11$'):
        read_sample(dataset, 0)
    Image.fromarray(labels[:50]).save(file)
    with pytest.raises(ValueError, match=r'val/00001.png must have the size of its image, \(96, 96\)'):
        read_sample(dataset, 0)
    file.write_text('no image')
    with pytest.raises(ValueError, match='val/00001.png is not a readable label map'):
        read_sample(dataset, 0)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='no label map .*labels/val/00001.png for image .*val/00001.png'):
        read_sample(dataset, 0)
