"""Folders that can be read in several ways: one reading is taken, and what is left out is said."""

import os

import pytest
from helpers.own_data import read_splits, write_classes, write_coco, write_pairs, write_picture, write_text
from mmengine.config import Config

from mmstrip.own_data import write_classification, write_detection, write_segmentation


def names_of(written):
    """The classes, and the images of each split below the folder."""
    splits = read_splits(written.config)
    images = {
        split: sorted(os.path.relpath(sample['img_path'], 'data') for sample in part[1])
        for split, part in splits.items()
    }
    return list(splits['train'][0]), images


@pytest.mark.parametrize('name', ['train', 'test', 'Valid'])
def test_a_class_with_the_name_of_a_split(name, tmp_path):
    write_classes(
        tmp_path / 'data', [f'{kind}/{part}' for kind in ('bus', 'car', name) for part in ('day', 'night')], 3
    )
    written = write_classification('data')
    assert names_of(written)[0] == sorted(['bus', 'car', name])
    assert f'not taken for a split, as it is the only one: data/{name}' in written.found


def test_folders_beside_splits(tmp_path):
    write_classes(
        tmp_path / 'data', [f'{split}/{name}' for split in ('train', 'val', 'valid', 'extra') for name in 'ab']
    )
    write_picture(tmp_path / 'data' / 'cover.png')
    written = write_classification('data')
    classes, images = names_of(written)
    assert classes == ['a', 'b'] and {name.split('/')[0] for name in images['train'] + images['val']} == {
        'train',
        'val',
    }
    assert 'left out, beside the folders of splits: data/extra, data/valid, data/cover.png' in written.found


@pytest.mark.parametrize('out', [None, 'data/configs', 'data'])
def test_what_our_tools_write_is_no_class(out, tmp_path, monkeypatch):
    """Called within the folder, or with a place in it, twice."""
    write_classes(tmp_path / 'data', 'ab')
    if out is None:
        monkeypatch.chdir(tmp_path / 'data')
    for _ in range(2):
        written = write_classification('data' if out else '.', out)
        write_picture(tmp_path / 'data/work_dirs/curves.png')
        assert Config.fromfile(written.config).classes == ['a', 'b']
        assert written.found[0].split(':')[1].startswith(' 8 images of 2 classes')
        assert written.found[1] == 'classes of 4 images each'


def test_files_of_boxes_that_we_have_written(tmp_path, monkeypatch):
    monkeypatch.chdir(write_coco(tmp_path / 'data'))
    assert write_detection('.').found == write_detection('.').found


def test_links_are_followed_once(tmp_path):
    """Eight folders that lead to each other, and to what is above."""
    write_classes(tmp_path / 'data', [str(i) for i in range(8)], 2)
    for i in range(8):
        (tmp_path / f'data/{i}/above').symlink_to(tmp_path / 'data')
        for j in range(8):
            (tmp_path / f'data/{i}/to{j}').symlink_to(tmp_path / f'data/{j}')
    written = write_classification('data')
    assert written.found[0].startswith('data: 16 images of 8 classes')
    assert any('left out, links to files found before: ' in line and 'and 69 more' in line for line in written.found)


def test_links_from_split_to_split(tmp_path):
    write_classes(tmp_path / 'data', ['train/a', 'train/b', 'val/a', 'val/b'])
    (tmp_path / 'data/test').symlink_to('val')
    os.remove(tmp_path / 'data/val/a/0.png')
    (tmp_path / 'data/val/a/0.png').symlink_to(tmp_path / 'data/train/a/1.png')
    written = write_classification('data')
    _, images = names_of(written)
    assert len(images['train']) == 8 and len(images['val']) == 7 and 'val/a/0.png' not in images['val']
    assert images['test'] == images['val']
    assert 'left out, links to files found before: data/val/a/0.png' in written.found
    assert 'left out, beside the folders of splits: data/test' in written.found


def test_classes_in_other_folders_are_linked(tmp_path):
    write_classes(tmp_path / 'disk', 'ab')
    (tmp_path / 'data').mkdir()
    for name in 'ab':
        (tmp_path / 'data' / name).symlink_to(tmp_path / 'disk' / name)
    assert len(names_of(write_classification('data'))[1]['train']) == 6


@pytest.mark.parametrize(
    'masks, pairs',
    [
        ([f'{i}_mask' for i in (10, 20, 30, 40)], {'10': '10_mask', '20': '20_mask', '30': '30_mask', '40': '40_mask'}),
        ([f'{i}0mask' for i in range(1, 5)], {'10': '10mask', '20': '20mask', '30': '30mask', '40': '40mask'}),
        (['4', '30'], {'4': '4', '30': '30'}),
    ],
)
def test_pairs_by_endings(masks, pairs, tmp_path):
    """Digits belong to the number before the ending."""
    write_pairs(tmp_path / 'data', range(1, 41), masks)
    written = write_segmentation('data')
    samples = [sample for split in ('train', 'val') for sample in read_splits(written.config)[split][1]]
    stems = {tuple(os.path.basename(sample[key])[:-4] for key in ('img_path', 'seg_map_path')) for sample in samples}
    assert stems == set(pairs.items())
    assert any(line.startswith('pairs, such as: data/images/10.png and data/masks/10') for line in written.found) == (
        len(pairs) > 2
    )


def test_label_maps_beside_text_of_that_name(tmp_path):
    """Boxes of YOLO in labels, masks in masks; a second folder of masks."""
    write_pairs(tmp_path / 'data', '0123')
    write_text(tmp_path / 'data/labels/0.txt', '0 0.5 0.5 1 1')
    os.rename(write_pairs(tmp_path / 'more', '0123') / 'masks', tmp_path / 'data/annotations')
    written = write_segmentation('data')
    assert Config.fromfile(written.config).train_dataloader.dataset.data_prefix.seg_map_path == 'data/masks'
    assert 'label maps are those in data/masks, not in: data/labels, data/annotations' in written.found


def test_splits_of_pairs(tmp_path):
    for split in ('train', 'val', 'more'):
        write_pairs(tmp_path / 'data' / split, '0123')
    written = write_segmentation('data')
    assert 'left out, beside the folders of splits: data/more' in written.found
    assert len(names_of(written)[1]['train']) == 4
