"""Names of classes, files and folders are data: they come back as they were, and nothing in them runs."""

import os
from pathlib import Path

import pytest
from helpers import format_code
from helpers.own_data import read_splits, write_classes, write_coco, write_pairs, write_picture, write_text, write_voc
from mmengine.config import Config
from yapf.yapflib import yapf_api

from mmstrip.own_data import write_classification, write_detection, write_segmentation

NAMES = sorted(
    [
        *('{{ $HOME:x }}', '{{$HOME:x}}', '{{$UNSET:x}}', '{{fileDirname}}', '{{ fileBasename }}', '{{_base_.model}}'),
        *('{{$X:__import__("os").system("touch${IFS}ran")}}', '{{$UNSET:', '}}', '{', '{{', "'{{'$HOME:x'}}'"),
        *('!1{{$X:a\\+\\}}', '!2{{$X:a\\}}', ',__import__("os").system("touch ran")]#'),
        *("it's", 'say "hi"', 'back\\slash', '100%', '%(name)s', '$HOME', 'größe', '日本語', 'a: b', '#', 'c d'),
        'e\u2028f',
    ]
)
INERT = [name for name in NAMES if '{{' not in name]


@pytest.fixture(autouse=True)
def nothing_else(folder, tmp_path, monkeypatch):
    """Nothing may appear in the working directory but the data and what is written."""
    monkeypatch.setenv('HOME', '/where/the/heart/is')
    yield
    assert set(os.listdir(tmp_path)) <= {'data', 'own_data', 'dumps', 'out'}


def readings(config, yapf=False):
    """A config, as it is dumped into the work dir of a training, and as that one is dumped by a test."""
    os.mkdir('dumps')
    for place in ('dumps/first.py', 'dumps/second.py'):
        reading = Config.fromfile(config, format_python_code=yapf)
        yield reading
        reading.dump(place)
        assert os.environ['HOME'] not in Path(place).read_text()
        config = place
    yield Config.fromfile(config)


def test_classification(tmp_path, monkeypatch):
    monkeypatch.setattr(yapf_api, 'FormatCode', format_code)
    for name in NAMES:
        for file in (name, f' {name}', 'second'):
            write_picture(tmp_path / 'data' / name / f'{file}.png')
    for config in readings(write_classification('data').config, yapf=True):
        splits = read_splits(config)
        assert all(list(classes) == NAMES for classes, _ in splits.values())
        samples = [sample for split in ('train', 'val') for sample in splits[split][1]]
        assert len(samples) == 3 * len(NAMES)
        for sample in samples:
            name, file = os.path.relpath(sample['img_path'], 'data').split('/')
            assert name == NAMES[sample['gt_label']] and file[:-4].removeprefix(' ') in (name, 'second')
            assert os.path.isfile(sample['img_path'])


def check_boxes(config):
    for reading in readings(config):
        classes, samples = read_splits(reading)['train']
        assert list(classes) == NAMES and len(samples) == len(NAMES)
        for sample in samples:
            (box,) = sample['instances']
            assert os.path.isfile(sample['img_path']) and NAMES[box['bbox_label']] in sample['img_path']


def test_coco(tmp_path):
    for split in ('train', 'val'):

        def name_all(content, split=split):
            content['categories'] = [dict(id=i, name=name) for i, name in enumerate(NAMES, 1)]
            for image, box, name in zip(content['images'], content['annotations'], NAMES):
                image.update(file_name=f'{split}/{name}/{name}.jpg')
                box.update(category_id=image['id'])

        write_coco(tmp_path / 'data', f'{split}.json', count=len(NAMES), edit=name_all)
    check_boxes(write_detection('data').config)


def test_voc(tmp_path):
    write_voc(tmp_path / 'data', {name: (name, 20, 10, 50, 30) for name in [*NAMES, 'more']})
    for split, names in (('train', NAMES), ('val', ['more'])):
        write_text(tmp_path / f'data/ImageSets/Main/{split}.txt', '\n'.join(names))
    check_boxes(write_detection('data').config)


def test_segmentation(tmp_path):
    write_pairs(tmp_path / 'data', NAMES, values=range(len(NAMES)), classes='\n'.join(NAMES))
    for config in readings(write_segmentation('data').config):
        splits = read_splits(config)
        assert list(splits['train'][0]) == NAMES
        samples = [sample for split in ('train', 'val') for sample in splits[split][1]]
        assert len(samples) == len(NAMES)
        assert all(os.path.isfile(sample[key]) for sample in samples for key in ('img_path', 'seg_map_path'))


def test_folders(tmp_path):
    """Of images, and of what is written."""
    name = ' '.join(INERT)
    written = write_classification(write_classes(Path('data') / name, 'ab'), f'out/{name}')
    for config in readings(written.config):
        assert config.data.data_prefix == f'data/{name}' and config.classes == ['a', 'b']
        assert len(read_splits(config)['train'][1]) == 6


WRITERS = (
    (write_classification, lambda root: write_classes(root, 'ab')),
    (write_detection, write_coco),
    (write_segmentation, lambda root: write_pairs(root, '0123')),
)


@pytest.mark.parametrize('name', ['{{ $HOME:x }}', '{{fileDirname}}', 'a\nb', os.fsdecode(b'\xff')])
@pytest.mark.parametrize('writer, make', WRITERS)
def test_folders_that_configs_cannot_hold(writer, make, name, tmp_path):
    make(tmp_path / 'data' / name)
    make(tmp_path / 'data' / 'fine')
    for arguments in ((f'data/{name}',), ('data/fine', f'out/{name}')):
        with pytest.raises(ValueError, match='rename it') as error:
            writer(*arguments)
        assert '\n' not in str(error.value)
    assert not {'own_data', 'out'} & set(os.listdir(tmp_path))


def test_home_is_no_folder_of_images(tmp_path):
    """mmpretrain replaces a leading ~."""
    os.rename(write_classes(tmp_path / 'data', 'ab'), tmp_path / '~')
    written = write_classification('~', 'out')
    assert (
        written.found[2:] == ['val: 20% of each class, held out'] and len(read_splits(written.config)['train'][1]) == 6
    )
    os.rename(tmp_path / '~', tmp_path / 'data')
