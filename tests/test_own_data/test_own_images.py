"""Images as trainings load them: which way up, of what size, complete or not."""

import io
import json
import re
import struct
from unittest import mock

import mmcv
import numpy as np
import pytest
from helpers.own_data import PICTURE, write_classes, write_pairs, write_picture, write_voc
from PIL import Image, features

from mmstrip.own_data import write_classification, write_detection, write_segmentation
from mmstrip.utils.samples import ORIENTATION, inspect_image


def lying(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def with_exif(content: bytes, kind: int, value: bytes) -> bytes:
    """A JPEG with an orientation of any type of EXIF."""
    entry = struct.pack('>HHHI4s', 1, ORIENTATION, kind, 1, value)
    exif = b'Exif\0\0MM\0*\0\0\0\x08' + entry + bytes(4)
    return content[:2] + b'\xff\xe1' + struct.pack('>H', len(exif) + 2) + exif + content[2:]


def encoded(form, picture=PICTURE, **saving):
    file = io.BytesIO()
    picture.save(file, form, **saving)
    return file.getvalue()


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.tif', '.webp'])
@pytest.mark.parametrize('orientation', [1, 2, 5, 6, 8, 9])
def test_sizes_are_those_of_the_loader(suffix, orientation, tmp_path):
    path = write_picture(tmp_path / f'a{suffix}', exif=lying(orientation))
    assert inspect_image(path) == (mmcv.imread(path).shape[1::-1], 8)


@pytest.mark.parametrize('kind, value', [(1, b'\x06'), (2, b'6\0'), (3, b'\0\x06'), (4, b'\0\0\0\x06'), (99, b'?')])
def test_orientations_of_other_types(kind, value, tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_bytes(with_exif(encoded('JPEG'), kind, value))
    assert inspect_image(path)[0] == mmcv.imread(path).shape[1::-1]


def test_turned_tiffs_become_boxes_of_the_turned_picture(tmp_path):
    turned = PICTURE.transpose(Image.Transpose.ROTATE_90)
    boxes = {str(i): ('c', 20, 10, 60, 30) for i in range(4)}
    written = write_detection(write_voc(tmp_path / 'data', boxes, turned, '.tif', exif=lying(6)))
    content = json.loads((written.config.parent / 'train.json').read_text())
    assert (content['images'][0]['width'], content['images'][0]['height']) == (64, 48)
    assert content['annotations'][0]['bbox'] == [20, 10, 40, 20]


def test_headers_are_enough_for_most_files(tmp_path):
    with mock.patch('mmcv.imfrombytes', side_effect=AssertionError):
        for suffix in ('.jpg', '.png'):
            assert inspect_image(write_picture(tmp_path / f'a{suffix}')) == ((64, 48), 8)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'BMP', 'TIFF', *(['WEBP'] if features.check('webp') else [])])
def test_files_that_are_cut_short(form, tmp_path):
    write_classes(tmp_path / 'data', 'ab')
    broken = tmp_path / 'data' / 'a' / f'broken.{form.lower()}'
    content = encoded(form, Image.effect_noise((64, 48), 99).convert('RGB'))
    if form == 'JPEG':
        content = with_exif(content, 7, b'\xff\xd9\0\0')  # the end of a preview
    broken.write_bytes(content[: len(content) * 2 // 3])
    written = write_classification('data')
    assert any(re.match(rf'left out, not readable: {broken.relative_to(tmp_path)}', line) for line in written.found)
    write_voc(tmp_path / 'boxes', {'0': ('c', 1, 2, 30, 40)}, suffix='.png')
    broken.rename(tmp_path / f'boxes/JPEGImages/1{broken.suffix}')
    (tmp_path / 'boxes/Annotations/1.xml').write_bytes((tmp_path / 'boxes/Annotations/0.xml').read_bytes())
    with pytest.raises(ValueError, match=f'boxes/JPEGImages/1{broken.suffix} is not a readable image: .*decode|cannot'):
        write_detection('boxes')


def test_what_follows_the_end_of_a_picture(tmp_path):
    """Such as the film behind a photograph of a telephone."""
    path = tmp_path / 'a.jpg'
    path.write_bytes(encoded('JPEG') + bytes(2**17))
    assert inspect_image(path) == ((64, 48), 8)


def test_pictures_of_more_than_8_bits(tmp_path):
    write_classes(tmp_path / 'data', 'ab')
    deep = np.full((48, 64), 4095, np.uint16)
    write_picture(tmp_path / 'data/a/x.png', Image.fromarray(deep))
    write_picture(tmp_path / 'data/a/y.tif', Image.fromarray(deep))
    write_picture(tmp_path / 'data/b/z.tif', Image.fromarray(deep.astype(np.float32)))
    found = write_classification('data').found
    assert (
        '2 images of more than 8 bits, loaded as 8 (12-bit values become 0 to 15): data/a/x.png, data/a/y.tif' in found
    )
    assert 'left out, not readable: data/b/z.tif' in found
    assert mmcv.imread('data/a/x.png').max() == 15


def test_long_pictures(tmp_path):
    write_classes(tmp_path / 'data', 'ab')
    for size in ((40, 9), (9, 40), (36, 9)):
        write_picture(tmp_path / 'data/a' / f'{size}.png', PICTURE.resize(size))
    found = write_classification('data').found
    assert (
        '2 images with sides over 4:1, cropped or shrunk in training: data/a/(40, 9).png, data/a/(9, 40).png' in found
    )


@pytest.mark.parametrize('big', [False, True])
def test_tiffs_with_two_sizes_are_not_decoded(big, tmp_path):
    """Pillow takes the last, and counts its pixels; OpenCV takes the first."""
    content = bytearray(encoded('TIFF', big_tiff=big))
    start = struct.unpack_from('<Q' if big else '<I', content, 8 if big else 4)[0]
    count, step = struct.unpack_from('<Q' if big else '<H', content, start)[0], 20 if big else 12
    entries = start + (8 if big else 2)
    tags = bytes(content[entries : entries + count * step])
    first = bytearray(tags[:step])
    struct.pack_into('<H', first, step - (8 if big else 4), 20000)
    content += struct.pack('<Q' if big else '<H', count + 1) + first + tags + bytes(8)
    struct.pack_into(
        '<Q' if big else '<I', content, 8 if big else 4, len(content) - len(first + tags) - (16 if big else 10)
    )
    (tmp_path / 'a.tif').write_bytes(content)
    with Image.open(tmp_path / 'a.tif') as image:
        assert image.size == (64, 48)
    with (
        mock.patch('mmcv.imfrombytes', side_effect=AssertionError),
        pytest.raises(ValueError, match='more than one width'),
    ):
        inspect_image(tmp_path / 'a.tif')


def test_label_maps_of_another_size_are_not_decoded(tmp_path):
    write_pairs(tmp_path / 'data', '0123')
    write_picture(tmp_path / 'data/masks/3.png', Image.new('L', (3000, 2000)))
    loaded = []
    load = Image.Image.load
    watch = mock.patch.object(Image.Image, 'load', lambda image: loaded.append(image.size) or load(image))
    with watch, pytest.raises(ValueError, match='masks/3.png must have the 64 x 48 pixels of its .* has 3000 x 2000'):
        write_segmentation('data')
    assert (3000, 2000) not in loaded
