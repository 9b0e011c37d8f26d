"""Boxes of COCO and PASCAL VOC: faults are named by file, row and field, and what is counted is trained on."""

import json
from collections import Counter
from xml.etree import ElementTree

import pytest
from helpers.own_data import BOX, read_splits, write_coco, write_picture, write_text, write_voc

from mmstrip.own_data import write_detection

RED = ('c', 20, 10, 50, 30)


def set_in(key, row=0, **values):
    return lambda content: content[key][row].update(values)


def set_all(**values):
    return lambda content: [box.update(values) for box in content['annotations']]


def without(key, field, row=0):
    return lambda content: content[key][row].pop(field)


def boxes_of(written) -> Counter:
    """The boxes of each class that all datasets give, and that are no crowd."""
    splits = read_splits(written.config)
    found = Counter()
    for split in {'train', 'val', 'test'}:
        classes, samples = splits[split]
        if split != 'test' or {s['img_path'] for s in samples} != {s['img_path'] for s in splits['val'][1]}:
            for sample in samples:
                found.update(classes[box['bbox_label']] for box in sample['instances'] if not box['ignore_flag'])
    return found


NUMBERS = 'annotations[1].bbox must be four finite numbers, but is '


@pytest.mark.parametrize(
    'edit, words',
    [
        (set_in('images', 2, id=1), 'images[0] and images[2] must not share the id 1'),
        (set_in('images', 2, file_name='1.jpg'), 'images[0] and images[2] must not share the file_name 1.jpg'),
        (
            lambda content: content['categories'].append(dict(id=1, name='dog')),
            '[1] must not share the id 1',
        ),
        (set_in('annotations', 1, bbox=None), f'{NUMBERS}None'),
        (set_in('annotations', 1, bbox=[]), f'{NUMBERS}[]'),
        (set_in('annotations', 1, bbox=[1, 2, 3]), f'{NUMBERS}[1, 2, 3]'),
        (set_in('annotations', 1, bbox=['20', '10', '30', '20']), NUMBERS),
        (set_in('annotations', 1, bbox=[1, 2, 3, float('nan')]), NUMBERS),
        (set_in('annotations', 1, bbox=[1, 2, 3, float('inf')]), NUMBERS),
        (set_in('annotations', 1, bbox=[1, 2, 3, 10**400]), NUMBERS),
        (set_in('annotations', 1, bbox=[1, 2, 3, True]), NUMBERS),
        (set_in('annotations', 1, bbox={'x': 1}), NUMBERS),
        (set_in('annotations', 1, image_id='2'), "annotations[1].image_id must be a whole number, but is '2'"),
        (set_in('annotations', 1, image_id=9), 'annotations[1] has image_id 9, but no image has this id'),
        (set_in('annotations', 1, category_id=[1]), 'annotations[1].category_id must be a whole number, but is [1]'),
        (set_in('annotations', 1, category_id=2), 'annotations[1] has category_id 2, but no category has this id'),
        (set_in('annotations', 1, iscrowd='0'), "annotations[1].iscrowd must be 0 or 1, but is '0'"),
        (set_in('annotations', 1, ignore='no'), 'annotations[1].ignore must be 0 or 1'),
        (set_in('images', 1, id=None), 'images[1].id must be a whole number, but is None'),
        (set_in('images', 1, id=1.5), 'images[1].id must be a whole number, but is 1.5'),
        (set_in('images', 1, width='64'), "images[1].width must be a positive number, but is '64'"),
        (set_in('images', 1, height=0), 'images[1].height must be a positive number, but is 0'),
        (set_in('images', 1, file_name=None), 'images[1].file_name must be a name on one line, but is None'),
        (set_in('images', 1, file_name=['2.jpg']), 'images[1].file_name must be a name on one line'),
        (without('images', 'width', 1), 'images[1] must have the field width, but has none'),
        (without('images', 'id', 1), 'images[1] must have the field id, but has none'),
        (without('categories', 'id'), 'categories[0] must have the field id, but has none'),
        (without('categories', 'name'), 'categories[0] must have the field name, but has none'),
        (
            without('annotations', 'image_id', 3),
            'annotations[3] must have the field image_id, but has none',
        ),
        (without('annotations', 'bbox', 3), 'annotations[3] must have the field bbox, but has none'),
        (lambda content: content.update(images={'1': {}}), ': images must be a list of objects'),
        (lambda content: content['annotations'].append(None), ': annotations must be a list of objects'),
        (lambda content: content.update(categories='cell'), ': categories must be a list of objects'),
        (lambda content: content.update(categories=None), ' has no categories'),
    ],
)
@pytest.mark.parametrize('split', ['train', 'val'])
def test_wrong_rows(split, edit, words, tmp_path):
    """In training and validation alike; one sentence, and nothing is written."""
    for name in ('train', 'val'):
        write_coco(tmp_path / 'data' / name)
    (tmp_path / f'data/{split}/a.json').unlink()
    content = json.loads((write_coco(tmp_path / 'fine') / 'a.json').read_text())
    edit(content)
    write_text(tmp_path / f'data/{split}/a.json', json.dumps(content))
    with pytest.raises(ValueError) as error:
        write_detection('data')
    assert str(error.value).startswith(f'data/{split}/a.json') and words in str(error.value)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300
    assert not (tmp_path / 'own_data').exists()


@pytest.mark.parametrize(
    'edit, anew',
    [
        (set_all(area=0), 'areas from boxes'),
        (set_all(area=None), 'areas from boxes'),
        (set_all(area='600'), 'areas from boxes'),
        (set_all(area=float('nan')), 'areas from boxes'),
        (set_all(area=-1), 'areas from boxes'),
        (without('annotations', 'area', 2), 'areas from boxes'),
        (set_all(id=3), 'ids from 1'),
        (set_all(id=None), 'ids from 1'),
        (set_in('annotations', 0, id=0), 'ids from 1'),
        (set_all(iscrowd=None), 'iscrowd'),
        (
            lambda content: content.update(categories=[dict(id=0, name='cell'), *content['categories']]),
            'without dup',
        ),
    ],
)
def test_what_can_be_completed(edit, anew, tmp_path):
    for split in ('train', 'val'):
        write_coco(tmp_path / 'data' / split, edit=edit)
    written = write_detection('data')
    assert any(f'{split}/a.json is rewritten: {anew}' in line for line in written.found for split in ('train', 'val'))
    assert boxes_of(written) == {'cell': 8} and 'boxes of 1 classes: 8 cell' in written.found
    for split in ('train', 'val'):
        content = json.loads((written.config.parent / f'{split}.json').read_text())
        assert content['categories'] == [dict(id=1, name='cell')]
        assert [box['id'] for box in content['annotations']] == [1, 2, 3, 4]
        assert all(box['area'] == 600 and box['iscrowd'] == 0 and box['bbox'] == BOX for box in content['annotations'])


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_encodings_of_coco(encoding, tmp_path):
    for split in ('train', 'val'):
        write_coco(tmp_path / 'data' / split, edit=set_in('categories', name='größe'), encoding=encoding)
    written = write_detection('data')
    assert boxes_of(written) == {'größe': 8}
    assert (written.config.parent / 'train.json').exists() == (encoding != 'utf-8')


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(iscrowd=1), 'boxes of crowds, or marked as difficult or ignored, are not trained on'),
        (dict(ignore=1), 'boxes of crowds, or marked as difficult or ignored, are not trained on'),
        (dict(bbox=[5, 5, 0, 9]), 'boxes without area are not trained on'),
        (dict(bbox=[5, 5, -9, -9]), 'boxes without area are not trained on'),
        (dict(bbox=[5, 5, 0.5, 9]), 'boxes without area are not trained on'),
        (dict(bbox=[70, 5, 9, 9]), 'boxes outside of their image are not trained on'),
        (dict(bbox=[-20, -20, 10, 10]), 'boxes outside of their image are not trained on'),
    ],
)
def test_boxes_that_are_not_trained_on(change, words, tmp_path):
    """They do not count; where there are no others, there is nothing to train on."""
    for split in ('train', 'val'):
        write_coco(tmp_path / 'data' / split, edit=set_in('annotations', 0, **change))
        write_coco(tmp_path / 'all' / split, edit=set_all(**change))
    written = write_detection('data')
    assert f'train: 1 {words}, in 1.jpg' in written.found and f'val: 1 {words}, in 1.jpg' in written.found
    assert boxes_of(written) == {'cell': 6} and 'boxes of 1 classes: 6 cell' in written.found
    with pytest.raises(ValueError, match='^all/train/a.json has no box to train on: all 4 are'):
        write_detection('all')


def test_classes_that_have_only_boxes_of_crowds(tmp_path):
    def add(content):
        content['categories'].append(dict(id=2, name='dust'))
        content['annotations'].append(dict(content['annotations'][0], id=9, category_id=2, iscrowd=1))

    def add_in_val(content):
        add(content)
        content['annotations'][-1]['iscrowd'] = 0

    write_coco(tmp_path / 'data' / 'train', edit=add)
    write_coco(tmp_path / 'data' / 'val', edit=add_in_val)
    written = write_detection('data')
    assert 'left out, classes without a training box: dust' in written.found
    assert 'val: 1 boxes of classes that are left out are not trained on, in 1.jpg' in written.found
    assert boxes_of(written) == {'cell': 8}


def test_images_that_are_not_trained_on(tmp_path):
    def remove(content):
        del content['annotations'][0]

    for split in ('train', 'val'):
        write_coco(tmp_path / 'data' / split, edit=remove)
    written = write_detection('data')
    words = '1 images without boxes, or with a side of less than 32 pixels, are not trained on: '
    assert f'train: {words}data/train/1.jpg' in written.found and f'val: {words}data/val/1.jpg' not in written.found
    assert len(read_splits(written.config)['train'][1]) == 3


def test_voc_boxes_that_are_not_trained_on(tmp_path):
    write_voc(tmp_path / 'data', {str(i): RED for i in range(5)})
    for i in range(5):
        file = tmp_path / f'data/Annotations/{i}.xml'
        tree = ElementTree.parse(file)
        for node in tree.findall('object'):
            ElementTree.SubElement(node, 'difficult').text = str(int(i != 3))
        tree.write(file)
    write_text(tmp_path / 'data/ImageSets/Main/train.txt', '2\n3\n4')
    write_text(tmp_path / 'data/ImageSets/Main/val.txt', '0\n1')
    written = write_detection('data')
    assert boxes_of(written) == {'c': 1} and 'boxes of 1 classes: 1 c' in written.found
    assert (
        'train: 2 boxes of crowds, or marked as difficult or ignored, are not trained on, in 2.jpg, 4.jpg'
        in written.found
    )


def test_voc_images_without_annotations(tmp_path):
    write_voc(tmp_path / 'data', {str(i): RED for i in range(5)})
    write_picture(tmp_path / 'data/JPEGImages/more.jpg')
    assert 'left out, images without XML: data/JPEGImages/more.jpg' in write_detection('data').found
    write_text(tmp_path / 'data/ImageSets/Main/train.txt', '0\n1\n2\n3')
    found = write_detection('data').found
    assert 'left out, images in no list: data/JPEGImages/4.jpg, data/JPEGImages/more.jpg' in found


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_encodings_of_voc_lists(encoding, tmp_path):
    write_voc(tmp_path / 'data', {f'größe {i}': RED for i in range(3)})
    write_text(tmp_path / 'data/ImageSets/Main/train.txt', 'größe 0\r\ngröße 1\r\n\r\n', encoding)
    write_text(tmp_path / 'data/ImageSets/Main/val.txt', 'größe 2 -1\n', encoding)
    assert write_detection('data').found[0] == 'data: 3 images, 64 x 48: 2 train, 1 val'


def test_deep_xml(tmp_path):
    write_voc(tmp_path / 'data', {str(i): RED for i in range(3)})
    text = (tmp_path / 'data/Annotations/1.xml').read_text()
    text = text.replace('<annotation>', '<annotation>' + '<a>' * 50000 + '</a>' * 50000)
    write_text(tmp_path / 'data/Annotations/1.xml', text)
    assert boxes_of(write_detection('data')) == {'c': 3}
