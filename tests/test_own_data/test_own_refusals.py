"""Folders that cannot be used: one sentence each that names the file, and nothing is written."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.own_data import write_classes, write_coco, write_pairs, write_picture, write_text, write_voc
from PIL import Image

from mmstrip.models import StripMLP
from mmstrip.own_data import write_classification, write_detection, write_segmentation

RED = ('c', 20, 10, 50, 30)
VARIABLE = '{{$HOME:x}}'
VOC = {str(i): RED for i in range(3)}


def classes(root):
    write_classes(root, ('one', 'two'), 2)


def pairs(*values, names='01', **options):
    return lambda root: write_pairs(root, names, values=values or (0, 1), **options)


def label_maps(labels, suffix='.png'):
    """Images with label maps of any content."""

    def write(root):
        write_pairs(root, '01', [])
        for name in '01':
            write_picture(root / f'masks/{name}{suffix}', Image.fromarray(labels))

    return write


def boxes(**values):
    """A COCO file whose first category has other values."""
    return lambda root: write_coco(root, edit=lambda content: content['categories'][0].update(values))


def with_file(make, name, text, encoding='utf-8'):
    def write(root):
        make(root)
        write_text(root / name, text, encoding)

    return write


def voc(root):
    write_voc(root, VOC)


def same_category(content):
    content['categories'].append(dict(id=2, name='cell'))
    content['annotations'][0]['category_id'] = 2


def same_image(content):
    content['images'].append(dict(content['images'][0], id=9, file_name='./1.jpg'))


def cut_short(root):
    write_pairs(root, '01')
    content = (root / 'masks/1.png').read_bytes()
    (root / 'masks/1.png').write_bytes(content[:-30])


def empty_class(root):
    write_classes(root, ['one'], 2)
    (root / 'two').mkdir()


def colors(root):
    return label_maps(np.zeros((48, 64, 3), np.uint8))(root)


FLOATS = np.zeros((48, 64), np.float32)
FEW = 'must name at least two classes'
NO_JSON = r'data/b.json( is not JSON|: annotations must be|.* has no categories)'
SEVERAL = 'must have at least two classes together, but have'


@pytest.mark.parametrize(
    'writer, make, options, words',
    [
        (write_classification, lambda root: None, {}, 'no folder at data'),
        (write_classification, empty_class, {}, 'two must hold at least 2 readable images, but has 0'),
        (
            write_classification,
            classes,
            dict(batch_size=5),
            'must be at most 2, the training images of data, but got 5',
        ),
        (write_classification, lambda root: write_picture(root / 'a.png'), {}, 'must be in the folder of its class'),
        *(
            (write_classification, classes, dict(out=out), 'out must be a folder, but data/one/0.png is a file')
            for out in ('data/one/0.png', 'data/one/0.png/below')
        ),
        (write_classification, classes, dict(epochs=1), 'epochs must be at least 2'),
        *(
            (write_classification, classes, {name: wrong}, f'{name} must be a positive int, but got {wrong!r}')
            for name, wrong in (('size', '64'), ('epochs', 2.5), ('batch_size', True))
        ),
        (write_classification, lambda root: write_classes(root, ['val/a', 'test/a', 'bus/a']), {}, 'no folder train'),
        *(
            (write_classification, lambda root, name=name: write_classes(root, [f'a/{name}', 'b']), {}, 'rename it')
            for name in ('a\nb', 'a\rb', os.fsdecode(b'\xff'))
        ),
        (write_detection, lambda root: root.mkdir(), {}, 'has no annotations'),
        (
            write_detection,
            lambda root: [write_coco(root, f'{name}.json') for name in 'ab'],
            {},
            'are both for train; keep',
        ),
        (write_detection, lambda root: write_coco(root, count=0), {}, 'has no annotations'),
        (
            write_detection,
            lambda root: (write_coco(root) / '3.jpg').unlink(),
            {},
            'lists images that data does not contain: 3.jpg',
        ),
        (write_detection, write_coco, dict(model='yolo'), "model must be one of faster-rcnn, dino, but got 'yolo'"),
        (write_detection, write_coco, dict(model='dino', size=64), 'size must be at least 320 for dino'),
        (write_detection, write_coco, dict(batch_size=0), 'batch_size must be a positive int, but got 0'),
        (
            write_detection,
            lambda root: [write_coco(root, f'{split}.json') for split in ('train', 'val')],
            {},
            'data/1.jpg must be in only one split, but is in train and val',
        ),
        (
            write_detection,
            lambda root: write_coco(root, edit=same_image),
            {},
            r'a.json: images\[0\] and images\[4\] must not share the file_name',
        ),
        (
            write_detection,
            lambda root: write_coco(root, edit=same_category),
            {},
            "data.* must name each class once, but has 'cell' 2 times",
        ),
        *(
            (write_detection, boxes(name=name), {}, r'a.json: categories\[0\].name must be a name on one line, but is')
            for name in ('a\nb', 'a\rb', 'a\x1b[2Jb', ' ', '', None, 7, '\ud800')
        ),
        (
            write_detection,
            lambda root: write_coco(root, edit=lambda c: c['categories'][0].update(name='ö'), encoding='latin-1'),
            {},
            'data/a.json is not JSON: .*utf-8',
        ),
        *(
            (write_detection, with_file(write_coco, 'b.json', text, 'latin-1'), {}, NO_JSON)
            for text in ('{', '[' * 100000, '{"images": ' + '[' * 100000, '{"images": [], "annotations": 1e9}', 'ÿ', '')
        ),
        (
            write_detection,
            lambda root: write_picture(write_voc(root, VOC) / 'JPEGImages/0.png'),
            {},
            '0.png share one annotation file',
        ),
        *(
            (write_detection, with_file(voc, f'ImageSets/Main/{list}.txt', text, encoding), {}, words)
            for list, text, encoding, words in (
                ('train', 'größe', 'latin-1', 'data/ImageSets/Main/train.txt must be UTF-8 text'),
                ('train', '\n', 'utf-8', 'data/ImageSets/Main/train.txt must list at least one image, but is empty'),
                ('train', 'more', 'utf-8', 'data/JPEGImages has no image named more'),
                ('val', '0', 'utf-8', 'must have train.txt or trainval.txt, but has val'),
            )
        ),
        (
            write_detection,
            with_file(
                lambda root: (write_voc(root, VOC) / 'Annotations/1.xml').unlink(), 'ImageSets/Main/train.txt', '1'
            ),
            {},
            'no annotation file at data/Annotations/1.xml',
        ),
        (write_segmentation, lambda root: root.mkdir(), {}, 'must have a folder of images'),
        (write_segmentation, pairs(0, 3, 7), {}, 'class numbers from 0 without gaps'),
        (
            write_segmentation,
            pairs(0, 1, 2, 3, classes='a\nb'),
            {},
            'from 0 to 1, as data/classes.txt names 2 .* have 2, 3$',
        ),
        (write_segmentation, label_maps(np.eye(9, 8, dtype=np.uint8)), {}, 'the 64 x 48 pixels of its .* has 8 x 9'),
        (write_segmentation, label_maps(np.full((48, 64), 256, np.uint16)), {}, 'from 0 to 255, but has 256'),
        *(
            (
                write_segmentation,
                label_maps(FLOATS + value, '.tif'),
                {},
                '0.tif must hold class numbers from 0 to 255, but has',
            )
            for value in (np.float32(0.5), np.float32(-1), np.float32(256), np.float32(np.nan))
        ),
        (write_segmentation, cut_short, {}, 'data/masks/1.png is not a readable label map: '),
        (write_segmentation, colors, {}, r'has colors \(mode RGB\)'),
        (write_segmentation, pairs(0, 0), {}, SEVERAL),
        (write_segmentation, pairs(255, 255), {}, f'{SEVERAL} only 255$'),
        (write_segmentation, pairs(0, 128, classes='a\nb'), {}, 'have only 0, 128, one of which is ignored$'),
        (write_segmentation, pairs(1, 255, classes='a\nb'), {}, 'have only 1, 255, one of which is ignored$'),
        *(
            (write_segmentation, pairs(0, 255, classes=names), {}, 'is a mask of 0 and 255')
            for names in (None, 'background\nroad', 'background\nroad\ncar')
        ),
        (write_segmentation, pairs(names=range(1, 41), masks=['3_mask']), {}, 'at least two images'),
        *(
            (
                write_segmentation,
                pairs(names=[name, 'b']),
                {},
                'names in data/images must not begin or end with a space',
            )
            for name in ('a ', ' a')
        ),
        *(
            (write_segmentation, with_file(pairs(), 'classes.txt', text, encoding), {}, f'data/classes.txt {words}')
            for text, encoding, words in (
                ('background\nstraße', 'latin-1', 'must be UTF-8 text'),
                ('road\nroad', 'utf-8', "must name each class once, but has 'road' 2 times"),
                ('background\n\nroad', 'utf-8', "must name each class on one line of UTF-8 text, but has ''"),
                ('background\nro\0ad', 'utf-8', 'must name each class on one line of UTF-8 text'),
                ('', 'utf-8', f'{FEW}, .* names none$'),
                ('a', 'utf-8', f'{FEW}, including the background, but names a$'),
                ('__ignore__\nroad', 'utf-8', FEW),
            )
        ),
        (write_segmentation, pairs(), dict(arch='huge'), "arch must be one of .* but got 'huge'"),
        (write_segmentation, pairs(), dict(init='none.pth'), 'no checkpoint at none.pth'),
        # The folder of the images of a COCO file, and the ending of all names of images.
        (write_detection, lambda root: write_coco(root / VARIABLE), {}, 'rename it'),
        (write_segmentation, pairs(names=[f'{i}_{{{{x}}}}' for i in range(3)], masks='012'), {}, 'rename it'),
    ],
)
def test_wrong_folders(writer, make, options, words, tmp_path):
    make(tmp_path / 'data')
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        writer('data', **options)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'own_data').exists()


BOMB = ''.join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip('abcdefgh', 'bcdefghi'))
CORNERS = '<bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'


@pytest.mark.parametrize(
    'text',
    [
        f'<!DOCTYPE x [<!ENTITY a "a">{BOMB}]><annotation><object><name>&i;</name></object></annotation>',
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotation><object><name>&a;</name></object></annotation>',
        '<a>' * 50000,
        '<?xml version="1.0" encoding="none"?><annotation/>',
        '<annotation><object><name>größe</name></object></annotation>',
        '<annotation><object><name>c</name></object></annotation>',
        *(
            f'<annotation><object><name>c</name>{CORNERS.format(value)}</object></annotation>'
            for value in ('nan', 'inf', '1e999', 'one', '')
        ),
    ],
)
def test_voc_files_of_other_things(text):
    write_text(write_voc(Path('data'), VOC) / 'Annotations/1.xml', text, 'latin-1')
    with pytest.raises(ValueError, match='data/Annotations/1.xml is not a PASCAL VOC annotation file: ') as error:
        write_detection('data')
    assert '\n' not in str(error.value)


def test_checkpoints_that_configs_cannot_hold(tmp_path):
    """Their path, and what stands before the names of their weights."""
    classes(tmp_path / 'data')
    weights = StripMLP(dict(embed_dims=8, depths=(1, 1, 1, 1)), img_size=32).state_dict()
    for name, prefix in ((VARIABLE, ''), ('fine', VARIABLE)):
        torch.save({prefix + key: value for key, value in weights.items()}, f'{name}.pth')
        with pytest.raises(ValueError, match=r'\{\{\$HOME:x\}\}.* has \{\{, a line break or invalid UTF-8'):
            write_classification('data', init=f'{name}.pth')
    assert not (tmp_path / 'own_data').exists()
