"""Label maps and the names of their classes."""

import numpy as np
import pytest
from helpers.own_data import read_splits, write_pairs, write_picture, write_text
from mmengine.config import Config
from PIL import Image

from mmstrip.own_data import write_segmentation


@pytest.mark.parametrize('encoding, line', [('utf-8', '\n'), ('utf-8-sig', '\r\n'), ('utf-16', '\r')])
def test_encodings_of_names(encoding, line, tmp_path):
    write_pairs(tmp_path / 'data', '0123')
    (tmp_path / 'data/classes.txt').write_bytes(f'background{line}straße{line}{line}'.encode(encoding))
    assert read_splits(write_segmentation('data').config)['train'][0] == ('background', 'straße')


def test_names_as_labelme_has_them(tmp_path):
    write_pairs(tmp_path / 'data', '0123')
    write_text(tmp_path / 'data/labels.txt', '__ignore__\n_background_\ncat')
    written = write_segmentation('data')
    assert Config.fromfile(written.config).classes == ['_background_', 'cat']
    assert 'data/labels.txt begins with __ignore__, which is not a class' in written.found


def test_two_files_of_names(tmp_path):
    write_pairs(tmp_path / 'data', '0123', classes='a\nb')
    write_text(tmp_path / 'data/labels.txt', 'c\nd')
    written = write_segmentation('data')
    assert Config.fromfile(written.config).classes == ['a', 'b']
    assert 'names of classes from data/classes.txt, not: data/labels.txt' in written.found


@pytest.mark.parametrize('mode', ['P', '1', 'I;16', 'L'])
def test_kinds_of_label_maps(mode, tmp_path):
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
