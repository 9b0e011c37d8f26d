"""Label maps and the names of their classes."""

import numpy as np
import pytest
from helpers.own_data import read_splits, write_pairs, write_picture, write_text
from mmengine.config import Config
from PIL import Image

from mmstrip.own_data import write_segmentation


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('line', ['\n', '\r\n', '\r'])
def test_encodings_of_names(encoding, line, tmp_path):
    write_pairs(tmp_path / 'data', '0123')
    (tmp_path / 'data/classes.txt').write_bytes(f'background{line}straße{line}{line}'.encode(encoding))
    assert read_splits(write_segmentation('data').config)['train'][0] == ('background', 'straße')


@pytest.mark.parametrize(
    'content, words',
    [
        ('background\nstraße'.encode('latin-1'), 'must be text in UTF-8'),
        (b'road\nroad', "must name each class once, but has 'road' 2 times"),
        (b'background\n\nroad', "must name each class in one line of UTF-8, but has ''"),
        (b'background\nro\0ad', 'must name each class in one line of UTF-8'),
        (b'', 'must name at least two classes'),
        (b'__ignore__\nroad', 'must name at least two classes'),
    ],
)
def test_wrong_names(content, words, tmp_path):
    write_pairs(tmp_path / 'data', '0123')
    (tmp_path / 'data/classes.txt').write_bytes(content)
    with pytest.raises(ValueError, match=rf'data/classes.txt {words}') as error:
        write_segmentation('data')
    assert '\n' not in str(error.value)


def test_names_as_labelme_has_them(tmp_path):
    write_pairs(tmp_path / 'data', '0123')
    write_text(tmp_path / 'data/labels.txt', '__ignore__\n_background_\ncat')
    written = write_segmentation('data')
    assert Config.fromfile(written.config).classes == ['_background_', 'cat']
    assert 'data/labels.txt begins with __ignore__, which is no class' in written.found


def test_two_files_of_names(tmp_path):
    write_pairs(tmp_path / 'data', '0123', classes='a\nb')
    write_text(tmp_path / 'data/labels.txt', 'c\nd')
    written = write_segmentation('data')
    assert Config.fromfile(written.config).classes == ['a', 'b']
    assert 'names of classes from data/classes.txt, not: data/labels.txt' in written.found


@pytest.mark.parametrize('classes', [None, 'background\nroad', 'background\nroad\ncar'])
def test_masks_of_0_and_255(classes, tmp_path):
    write_pairs(tmp_path / 'data', '0123', values=(0, 255), classes=classes)
    with pytest.raises(ValueError, match='is a mask of 0 and 255'):
        write_segmentation('data')


@pytest.mark.parametrize('mode, values', [('P', (0, 1)), ('1', (0, 1)), ('I;16', (0, 1)), ('L', (0, 1))])
def test_kinds_of_label_maps(mode, values, tmp_path):
    """Numbers are found as mmseg reads them."""
    from mmengine.registry import TRANSFORMS, init_default_scope

    write_pairs(tmp_path / 'data', '0123')
    labels = np.array(Image.open(tmp_path / 'data/masks/0.png'))
    for i in range(4):
        image = Image.fromarray(labels.astype(np.uint16 if mode == 'I;16' else np.uint8) if mode != '1' else labels > 0)
        if mode == 'P':
            image.putpalette([255, 0, 0, 0, 255, 0])
        assert image.mode == mode
        write_picture(tmp_path / f'data/masks/{i}.png', image)
    written = write_segmentation('data')
    assert Config.fromfile(written.config).classes == ['0', '1']
    init_default_scope('mmseg')
    load = TRANSFORMS.build(dict(type='LoadAnnotations'))
    (sample, *_) = read_splits(written.config)['train'][1]
    assert np.array_equal(load(sample)['gt_seg_map'], labels)


@pytest.mark.parametrize('value', [0.5, -1.0, 256.0, np.nan])
def test_label_maps_of_other_numbers(value, tmp_path):
    write_pairs(tmp_path / 'data', '01')
    for i in range(2):
        (tmp_path / f'data/masks/{i}.png').unlink()
        labels = np.zeros((48, 64), np.float32)
        labels[:9] = value
        write_picture(tmp_path / f'data/masks/{i}.tif', Image.fromarray(labels))
    with pytest.raises(ValueError, match='0.tif must hold numbers from 0 to 255, but has'):
        write_segmentation('data')


def test_label_maps_that_cannot_be_read(tmp_path):
    write_pairs(tmp_path / 'data', '0123')
    content = (tmp_path / 'data/masks/2.png').read_bytes()
    (tmp_path / 'data/masks/2.png').write_bytes(content[: len(content) - 30])
    with pytest.raises(ValueError, match='data/masks/2.png is not a readable label map: '):
        write_segmentation('data')


@pytest.mark.parametrize('name', ['a ', ' a'])
def test_spaces_around_names(name, tmp_path):
    write_pairs(tmp_path / 'data', [name, 'b', 'c'])
    with pytest.raises(ValueError, match='data/images must have names that neither begin nor end with a space'):
        write_segmentation('data')
