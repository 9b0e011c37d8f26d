"""What exported files say of themselves, as anybody may have written it: right, or refused in one sentence."""

import json
import random
import struct
import zipfile
import zlib

import cv2
import mmcv
import numpy as np
import onnx
import pytest
import torch
from helpers import Malicious
from mmcv.transforms import Resize
from onnx import TensorProto, helper
from PIL import Image

from mmstrip.deployment import load
from mmstrip.deployment.description import read_about
from mmstrip.deployment.formats import KEY, store, to_openvino
from mmstrip.deployment.preprocessing import read_picture, run_steps
from mmstrip.deployment.runtimes import open_session

ABOUT = dict(
    format='onnx',
    task='classifier',
    classes=['cat', 'dog', 'eel'],
    channels=3,
    shape=[8, 8],
    steps=[dict(type='Resize', scale=[8, 8])],
    mean=[0.0, 0.0, 0.0],
    std=[1.0, 1.0, 1.0],
    outputs=['logits'],
    align_corners=None,
    threshold=None,
    scores=False,
    flip=False,
    normalize=False,
    dynamic_batch=False,
    dynamic_size=False,
    half=False,
)


def model_of(text='', more=(), functions=()):
    """Means of the channels, (1, 3), of images (1, 3, 8, 8); further constants."""
    nodes = [helper.make_node('ReduceMean', ['images', 'axes'], ['logits'], keepdims=0)]
    images, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (('images', [1, 3, 8, 8]), ('logits', [1, 3]))
    )
    axes = helper.make_tensor('axes', TensorProto.INT64, [2], [2, 3])
    graph = helper.make_graph([*nodes, *more], 'means', [images], [logits], [axes])
    opsets = [helper.make_opsetid('', 18)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=9)
    helper.set_model_props(model, {KEY: text})
    return model


def write(folder, about, suffix='.onnx'):
    path, text = folder / f'model{suffix}', about if isinstance(about, str) else json.dumps(about)
    store(model_of() if suffix == '.onnx' else to_openvino(model_of()), path, text)
    return path


@pytest.mark.parametrize('suffix, form', [('.onnx', 'onnx'), ('.xml', 'openvino')])
def test_a_true_description_is_taken(suffix, form, tmp_path):
    predict = load(write(tmp_path, dict(ABOUT, format=form), suffix))
    (found,) = predict(np.full((30, 20, 3), (1, 5, 3), np.uint8))
    assert found['pred_class'] == 'dog' and found['pred_label'] == 1


CLASSES_WORDS = 'classes must be null or a list of 1 to 100000, each text of up to 1000 characters, but is'
WRONG = [
    (dict(std=[0, 1, 1]), r'std must be null or a list of 1 to 1024, each a number from 1e-06 to 1e\+06, but is'),
    (dict(std=[float('nan'), 1, 1]), r'std must be .* but is \[nan, 1, 1\]'),
    (dict(mean=[float('inf'), 1, 1]), 'mean must be'),
    (dict(mean=[10**400, 1, 1]), 'mean must be'),
    (dict(mean=[1, 1]), r'mean must be one number or 3, one per channel, but is \[1, 1\]'),
    (dict(mean=None), r'std must be given if and only if mean is, but is \[1.0, 1.0, 1.0\]'),
    (dict(shape=[10**9, 10**9]), 'shape must be a list of 2, each a whole number from 1 to 8192, but is'),
    (dict(shape=[8.0, 8]), 'shape must be'),
    (dict(shape=[16, 8]), "shape must be that of the graph's input, float32 1 x 3 x 8 x 8, but is"),
    (dict(channels=4, mean=None, std=None), "shape must be that of the graph's input"),
    (dict(channels=True), 'channels must be a whole number from 1 to 1024, but is True'),
    (dict(normalize=True), "shape must be that of the graph's input, .* but is 'uint8 1 x 3 x 8 x 8'"),
    (dict(dynamic_batch=True), r"shape must be that of the graph's input, .* but is 'float32 \? x 3 x 8 x 8'"),
    (dict(classes=[1, 2, 3]), f'{CLASSES_WORDS} \\[1, 2, 3\\]'),
    (dict(classes='cat'), f"{CLASSES_WORDS} 'cat'"),
    (dict(classes=['\ud800', 'a', 'b']), CLASSES_WORDS),
    (dict(classes=['a', 'b']), 'cannot be those of the graph, 1 x 3$'),
    (dict(task='segmentor'), 'cannot be those of the graph, 1 x 3$'),
    (dict(task='detector'), 'cannot be those of the graph, 1 x 3$'),
    (dict(task='detector', outputs=['a'] * 3), 'threshold must be a number for a detector with masks, but is None'),
    (dict(task='poet'), 'task must be one of classifier, segmentor, detector, backbone, neck, but is'),
    (dict(task=['classifier']), 'task must be one of'),
    (dict(format='openvino'), "format must be the format of .onnx files, but is 'openvino'"),
    (dict(scores='no'), "scores must be one of True, False, but is 'no'"),
    (dict(steps=[dict(type='Evil')]), 'steps must be a list of 0 to 10, each a step of Resize, ResizeEdge, '),
    (dict(steps=[['Resize']]), 'steps must be a list'),
    (dict(steps=[dict(type='Resize', scale=[10**9, 8])]), 'steps.0.scale must be'),
    (
        dict(steps=[dict(type='Resize', scale=8, backend='pillow', interpolation='area')]),
        'interpolation must be nearest, .* with pillow',
    ),
    (dict(steps=[dict(type='Resize')]), 'steps.0 must have scale or scale_factor, but has neither'),
    (dict(steps=[dict(type='Resize', scale=8, backend='turbojpeg')]), 'steps.0.backend must be one of cv2, pillow'),
    (dict(steps=[dict(type='CenterCrop', crop_size=8, pad_cfg=dict(type='Evil'))]), 'steps.0.pad_cfg must be absent'),
    (dict(steps=[dict(type='ResizeEdge', edge='short')]), 'has no field steps.0.scale; write it with tools'),
    (dict(threshold=float('nan')), 'threshold must be a number from 0 to 1 or null, but is nan'),
    ('{', 'is damaged or not an exported file'),
    ('[' * 100_000, 'is damaged or not an exported file'),
    ('[]', 'has no description of the export; write it with tools/deployment/export.py'),
    ('', 'has no description of the export'),
]


@pytest.mark.parametrize('changes, words', WRONG, ids=map(str, range(len(WRONG))))
def test_what_cannot_be_is_refused_in_a_sentence(changes, words, tmp_path):
    path = write(tmp_path, changes if isinstance(changes, str) else {**ABOUT, **changes})
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    assert str(error.value).startswith(str(path)) and '\n' not in str(error.value) and len(str(error.value)) < 500


def test_a_missing_field_is_named(tmp_path):
    for name in ABOUT.keys() - {'task'}:
        with pytest.raises(ValueError, match=f'has no field {name}; write it with tools/deployment/export.py'):
            read_about(write(tmp_path, {key: value for key, value in ABOUT.items() if key != name}))


STRANGE = [None, True, 0, -1, 1e308, 2**70, float('nan'), '', 'a' * 2000, [], [[]], {}, {'type': {}}, [None] * 3]


def test_any_change_of_a_description_is_refused_or_harmless(tmp_path):
    generator, refused, taken = random.Random(0), 0, 0
    step = dict(type='Resize', scale=[8, 8], scale_factor=None, keep_ratio=False, backend='cv2', interpolation='area')
    for _ in range(400):
        about = dict(ABOUT, steps=[dict(step)])
        place = generator.choice([about, about['steps'][0]])
        key = generator.choice(list(place))
        place[key] = generator.choice([*STRANGE, [place[key]], *ABOUT.values()])
        try:
            load(write(tmp_path, about))(np.zeros((5, 9, 3), np.uint8))
            taken += 1
        except ValueError as error:
            refused += 1
            assert 'model.onnx' in str(error) and '\n' not in str(error)
    assert refused > 300 and taken > 5


def external(location):
    tensor = helper.make_tensor('weight', TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField('float_data')
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key='location', value=location)
    return tensor


@pytest.mark.parametrize('location', ['../secret.bin', '/etc/hostname', 'link.bin'])
@pytest.mark.parametrize('place', ['initializer', 'constant', 'sparse', 'branch', 'function'])
def test_weights_in_other_files_are_not_read(place, location, tmp_path):
    constant = helper.make_node('Constant', [], ['more'], value=external(location))
    model = model_of(json.dumps(ABOUT), [constant] if place == 'constant' else [])
    if place == 'initializer':
        model.graph.initializer.append(external(location))
    if place == 'sparse':
        model.graph.sparse_initializer.add().values.CopyFrom(external(location))
    if place == 'branch':
        branch = helper.make_graph([constant], 'branch', [], [])
        model.graph.node.append(helper.make_node('If', ['c'], ['d'], then_branch=branch, else_branch=branch))
    if place == 'function':
        opsets = [helper.make_opsetid('', 18)]
        model.functions.append(helper.make_function('own', 'f', [], ['more'], [constant], opsets))
    (tmp_path / 'link.bin').symlink_to('/etc/hostname')
    (tmp_path / 'model.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match='model.onnx is damaged .*: its weights are in other files'):
        load(tmp_path / 'model.onnx')


@pytest.fixture
def program(tmp_path):
    """A .pt2 whose sample inputs create a file when they are unpickled."""
    text = json.dumps(dict(ABOUT, format='torch-export'))
    exported = torch.export.export(torch.nn.Flatten(), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(exported, tmp_path / 'made.pt2', extra_files={f'{KEY}.json': text})
    with zipfile.ZipFile(tmp_path / 'made.pt2') as made, zipfile.ZipFile(tmp_path / 'evil.pt2', 'w') as evil:
        for name in made.namelist():
            with evil.open(name, 'w') as entry:
                if 'sample_inputs' in name and name.endswith('.pt'):
                    torch.save(Malicious(tmp_path / 'ran'), entry)
                else:
                    entry.write(made.read(name))
    return tmp_path / 'evil.pt2'


def test_programs_are_opened_with_trust_alone(program, tmp_path):
    for open_it in (load, read_about, open_session):
        with pytest.raises(
            ValueError,
            match='evil.pt2 runs code when it is opened. If .* pass trusted=True',
        ):
            open_it(program)
    assert read_about(program, trusted=True)['classes'] == ['cat', 'dog', 'eel']
    for name in ('renamed.onnx', 'renamed.xml'):
        program.with_name(name).write_bytes(program.read_bytes())
        program.with_name('renamed.bin').touch()
        with pytest.raises(ValueError, match='is damaged or not an exported file'):
            load(program.with_name(name))
    onnx.save(model_of(json.dumps(ABOUT)), tmp_path / 'renamed.xml', format='protobuf')  # OpenVINO would read it
    with pytest.raises(ValueError, match='renamed.xml is damaged or not an exported file: it is not XML'):
        load(tmp_path / 'renamed.xml')
    assert not (tmp_path / 'ran').exists()
    with pytest.raises(ValueError, match='evil.pt2 cannot be run: expected tuple or dict'):
        load(program, trusted=True)
    assert (tmp_path / 'ran').exists()  # or nothing was shown


def tiff(entries, data):
    """A TIFF of fields (tag, type, count, value), the last value that of where the data is."""
    start = 8 + 2 + 12 * len(entries) + 4
    entries = [(*entry[:3], start if entry[0] in (273, 324) else entry[3]) for entry in entries]
    fields = b''.join(struct.pack('<HHII', *entry) for entry in entries)
    return b'II*\0' + struct.pack('<IH', 8, len(entries)) + fields + bytes(4) + data


GRAY = [(258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]


def test_what_pixels_and_pictures_are_taken(tmp_path):
    predict = load(write(tmp_path, ABOUT))
    for wrong in (np.zeros((1, 1, 8, 8), np.uint8), np.zeros((1, 3, 8, 8), np.float32), np.zeros((3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match=r'takes pixels \(N, 3, H, W\) in uint8, but got'):
            predict.run(wrong)
    with pytest.raises(ValueError, match='batch_size must be a whole number from 1 to 65535, but got 0'):
        predict([], batch_size=0)
    with pytest.raises(TypeError, match=r'an image must be a path or an array \(H, W, 3\) in BGR, but got Image'):
        predict(Image.new('RGB', (8, 8)))
    with pytest.raises(ValueError, match=r'an image must be an array \(H, W, 3\) in uint8, but got \(0, 8, 3\)'):
        predict(np.zeros((0, 8, 3), np.uint8))
    predict.about['channels'] = 1
    with pytest.raises(ValueError, match='takes images with 1 channels, but got 3'):
        predict(np.zeros((8, 8, 3), np.uint8))


def test_pictures_are_as_large_as_they_say(tmp_path, monkeypatch):
    strip = zlib.compress(bytes(20_000 * 2000), 9)
    twice = [(256, 4, 1, 20_000), (256, 4, 1, 8), (257, 4, 1, 2000), (257, 4, 1, 8), *GRAY]
    (tmp_path / 'twice.tif').write_bytes(
        tiff([*twice, (273, 4, 1, 0), (278, 4, 1, 2000), (279, 4, 1, len(strip))], strip)
    )
    assert Image.open(tmp_path / 'twice.tif').size == (8, 8)
    assert cv2.imread(str(tmp_path / 'twice.tif')).shape == (2000, 20_000, 3)
    tiles = [(256, 4, 1, 8), (257, 4, 1, 8), *GRAY, (322, 4, 1, 16_000), (323, 4, 1, 16_000)]
    (tmp_path / 'tiles.tif').write_bytes(tiff([*tiles, (324, 4, 1, 0), (325, 4, 1, len(strip))], strip))
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name, options in (('plain.tif', {}), ('big.tif', dict(big_tiff=True)), ('tiled.tif', dict(tile=(16, 16)))):
        Image.fromarray(picture).save(tmp_path / name, **options)
        np.testing.assert_array_equal(read_picture(tmp_path / name), picture[..., ::-1])
    Image.fromarray(picture).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:-300])  # OpenCV fills it up
    (tmp_path / 'empty.png').touch()
    predict = load(write(tmp_path, ABOUT))
    for name, words in (
        ('cut.jpg', 'cut.jpg cannot be read as an image: image file is truncated'),
        ('empty.png', 'empty.png cannot be read as an image'),
        ('twice.tif', 'twice.tif cannot be read as an image: its TIFF header has a tag twice'),
        ('tiles.tif', 'tiles.tif cannot be read as an image: its tiles of 16000 x 16000 pixels are too large'),
        ('model.onnx', 'model.onnx cannot be read as an image: cannot identify image file'),
    ):
        with pytest.raises(ValueError, match=words):
            predict(tmp_path / name)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    with pytest.raises(ValueError, match=r'plain.tif .*: Image size \(1200 pixels\) exceeds limit of 1000 pixels'):
        predict(tmp_path / 'plain.tif')


@pytest.mark.parametrize(
    'options',
    [dict(scale=(50, 31)), dict(scale=(50, 31), keep_ratio=True), dict(scale=40), dict(scale_factor=1.7)],
)
def test_pictures_are_resized_as_by_mmcv(options):
    picture = np.random.default_rng(0).integers(0, 256, (45, 30, 3), dtype=np.uint8)
    expected = Resize(**options)(dict(img=picture))['img']
    np.testing.assert_array_equal(run_steps(picture, [dict(type='Resize', **options)]), expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    'step, size, words',
    [
        (dict(type='Resize', scale=[64, 64], keep_ratio=True), (1, 300), 'its 1 x 300 pixels would become 0 x 64'),
        (dict(type='Resize', scale_factor=100), (900, 900), 'its 900 x 900 pixels would become 90000 x 90000'),
        (dict(type='ResizeEdge', scale=256), (1, 30_000), 'its 1 x 30000 pixels would become 256 x 7680000'),
        (dict(type='ResizeEdge', scale=8, edge='long'), (300, 1), 'its 300 x 1 pixels would become 8 x 0'),
        (dict(type='CenterCrop', crop_size=8192, auto_pad=True), (1, 30_000), 'would become 8192 x 30000'),
    ],
)
def test_pictures_without_or_with_too_many_pixels_are_refused(step, size, words, tmp_path):
    """By OpenCV's error or gigabytes otherwise."""
    predict = load(write(tmp_path, dict(ABOUT, steps=[step])))
    with pytest.raises(ValueError, match=f'^an image does not fit .*model.onnx: .*{words}, which is'):
        predict(np.zeros((*size, 3), np.uint8))
    mmcv.imwrite(np.zeros((*size, 3), np.uint8), str(tmp_path / 'thin.png'))
    with pytest.raises(ValueError, match=f'thin.png does not fit .*model.onnx: .*{words}, which is empty'):
        predict(tmp_path / 'thin.png')
