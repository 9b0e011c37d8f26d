"""The demo's page through its own API client, started as users start it; what it shows of each task."""

import http.server
import json
import re
import runpy
import sys
import tempfile
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import ROOT
from helpers.exports import CLASSES, write_checkpoint
from helpers.runs import CONFIG, start_tool
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

from mmstrip.datasets.digit_split import split_digits
from mmstrip.deployment import load
from mmstrip.utils.config import load_config

DEMO = ROOT / 'demo' / 'app.py'


@pytest.fixture(scope='module')
def app():
    """The page's module, whose functions need no page."""
    spec = spec_from_file_location('mmstrip.page', DEMO)  # its errors are the project's, as when it is run
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def page(checkpoint, tmp_path_factory):
    """Of a classifier's checkpoint: its client, process and folder."""
    folder, port = tmp_path_factory.mktemp('page'), get_free_port()
    arguments = [checkpoint, CONFIG, '--layer', 'backbone.stages.1', '--port', port]
    process = start_tool(DEMO, *arguments, output=folder / 'page.txt', env=dict(TMPDIR=str(folder)))
    try:
        yield connect(process, f'http://127.0.0.1:{port}/', folder), process, folder
        process.terminate()
        process.join(60)
        assert not list(folder.glob('mmstrip-page-*'))
    finally:
        process.kill()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(SystemExit, match=r"needs gradio, which is not installed: pip install 'mmstrip\[demo\]'"):
        runpy.run_path(str(DEMO))


def connect(process, address: str, folder: Path) -> Client:
    for _ in range(1500):
        assert process.is_alive(), (folder / 'page.txt').read_text()
        try:
            httpx.get(address)
            return Client(address, verbose=False, download_files=str(folder), httpx_kwargs=dict(timeout=300))
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError('the page has not come')


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Gradio's client leaves an empty folder for each file that it gets."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture') / 'picture.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


def memory(process) -> float:
    """MiB."""
    return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{process.pid}/status').read_text())[1]) / 1024


def test_classes_and_where_a_classifier_looks(page, checkpoint, picture, tmp_path):
    from mmpretrain import ImageClassificationInferencer

    client, process, _ = page
    inferencer = ImageClassificationInferencer(str(CONFIG), pretrained=checkpoint, device='cpu')
    deep = tmp_path / 'deep.png'  # of 16 bits
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (64, 96), dtype=np.uint16)).save(deep)
    for path in (deep, picture):
        label, overlay = client.predict(handle_file(path), api_name='/predict')
        (expected,) = inferencer(str(path))
        assert label['label'] == expected['pred_class']
        found = [part['confidence'] for part in label['confidences']]
        np.testing.assert_allclose(found, np.sort(expected['pred_scores'])[:-6:-1], atol=1e-4)
    heat = np.asarray(Image.open(overlay))
    assert heat.shape == (320, 320, 3) and heat.std() > 5
    before = memory(process)
    for _ in range(15):
        client.predict(handle_file(picture), api_name='/predict')
    assert memory(process) < before + 20


def test_classes_of_one_name(app):
    assert app.unique_names(['crane', 'dog', 'crane']) == ['crane (0)', 'dog', 'crane (2)']
    assert app.unique_names(['a', 'a', 'a (1)']) == ['a (0)', 'a (1)', 'a (1) (2)']


def test_masks_of_a_segmentor(app, exported, picture):
    file = exported('segmentor')
    task, classes, predict = app.open_exported(str(file))
    _, shown = app.show(task, predict, classes, str(picture))
    labels = load(file)(str(picture))[0]
    assert [name for _, name in shown] == ['abcdefghijk'[i] for i in np.unique(labels)]
    for (drawn, _), i in zip(shown, np.unique(labels)):
        np.testing.assert_array_equal(drawn > 0, labels == i)


def test_boxes_and_masks_of_a_detector(app, detector, picture, monkeypatch):
    file = detector('MaskRCNN', form='openvino', normalize=True)
    task, classes, predict = app.open_exported(str(file))
    found = load(file)(str(picture))[0]
    monkeypatch.setattr(app, 'MIN_SCORE', np.median(found['scores']))
    _, shown = app.show(task, predict, classes, str(picture))
    likely = found['scores'] >= app.MIN_SCORE
    labels, counts = np.unique(found['labels'][likely], return_counts=True)
    assert len(labels) and [name for _, name in shown] == [f'{CLASSES[i]}: {n}' for i, n in zip(labels, counts)]
    for (drawn, _), i in zip(shown, labels):
        mine = likely & (found['labels'] == i)
        assert drawn.shape == (64, 96) and (drawn[found['masks'][mine].any(0)] >= 0.5).all()
        for x0, y0, x1, y1 in found['bboxes'][mine].astype(int):
            assert (drawn[y0 : y0 + 3, x0 + 2 : x1 - 1].max(0) == 1).all()
            assert (drawn[y0 + 2 : y1 - 1, x0 : x0 + 3].max(1) == 1).all()


def test_what_cannot_be_shown_is_said(page, picture, tmp_path):
    client = page[0]
    Image.new('1', (6000, 6000)).save(tmp_path / 'bomb.png')  # 5 kB
    (tmp_path / 'broken.png').write_bytes(picture.read_bytes()[:5000])
    (tmp_path / 'words.jpg').write_text('no picture')
    for name, words in (
        ('bomb.png', r'Image size \(36000000 pixels\) exceeds limit of 25000000 pixels'),
        ('broken.png', 'image file is truncated'),
        ('words.jpg', 'cannot identify image file'),
    ):
        with pytest.raises(AppError, match=f'^This file cannot be read as an image: {words}'):
            client.predict(handle_file(tmp_path / name), api_name='/predict')
    assert httpx.post(client.upload_url, files=dict(files=bytes(11 * 2**20))).status_code == 413
    assert client.predict(handle_file(picture), api_name='/predict')[0]['label'] in CLASSES


ONLY = 'This image was not uploaded to this page; upload it again'
MARK = {'_type': 'gradio.FileData'}


def post(address: str, payload) -> tuple[str, dict]:
    """What an answer to a raw request is, and holds."""
    called = httpx.post(f'{address}gradio_api/call/predict', json=dict(data=[payload]), timeout=60)
    lines = httpx.get(f'{address}gradio_api/call/predict/{called.json()["event_id"]}', timeout=60).text.split('\n')
    return lines[0].removeprefix('event: '), json.loads(lines[1].removeprefix('data: '))


def test_nothing_but_uploads_is_read(page, picture, tmp_path):
    """By raw requests, with Gradio's mark of an upload and without."""
    client, _, folder = page
    address = client.src
    upload = f'{address}gradio_api/upload'
    (path,) = httpx.post(upload, files=dict(files=('../../../../picture.png', picture.read_bytes()))).json()
    (own,) = folder.glob('mmstrip-page-*')
    assert Path(path).is_relative_to(own) and not (own.parent / 'picture.png').exists()
    (own / 'link.png').symlink_to(picture)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    other = f'http://127.0.0.1:{server.server_port}/picture.png'
    elsewhere = [
        str(picture),
        str(tmp_path / 'none.png'),
        f'{own}/../../{picture.name}',
        f'{own}/link.png',
        str(own),
        '',
    ]
    elsewhere += [other, 'http://93.184.215.14/x.png', 'https://example.com/x.png', f'{address}gradio_api/file={path}']
    elsewhere += [f'file://{picture}', 'data:image/png;base64,iVBORw0KGgo=', 'a\0b', 'a' * 5000]
    elsewhere += [None, 5, [path], {'path': path}]
    for place in elsewhere:
        for payload in ({'path': place}, {'path': place, 'meta': MARK}, {'path': place, 'url': other, 'meta': 5}):
            event, answer = post(address, payload)
            assert event == 'error' and answer['error'] == ONLY, (payload, answer)
    for payload in ('text', 5, [1], {}, {'url': other, 'meta': MARK}):
        assert post(address, payload)[1]['error'] == ONLY
    for place in (str(picture), other, 'https://example.com/x.png', f'{own}/link.png', f'{own}/../{picture.name}'):
        assert httpx.get(f'{address}gradio_api/file={place}').status_code == 403
    server.shutdown()
    assert not asked
    for payload in ({'path': path}, {'path': path, 'url': other, 'meta': MARK}):
        assert post(address, payload)[0] == 'complete'


def test_bursts_are_refused_beyond_what_may_wait_and_keep_no_memory(page, tmp_path):
    client, process, _ = page
    Image.new('RGB', (4000, 4000)).save(tmp_path / 'slow.jpg')  # slower to show than to send
    before = memory(process)
    jobs = [client.submit(handle_file(tmp_path / 'slow.jpg'), api_name='/predict') for _ in range(20)]
    errors = [str(job.exception(300)) for job in jobs if job.exception(300)]
    assert errors and all('full' in error for error in errors) and len(errors) < 20, errors
    assert memory(process) < before + 100  # 400 MiB if glibc keeps them


@pytest.fixture
def several_labels(tmp_path):
    config = load_config(str(CONFIG))
    config.model.head = dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=128)
    config.dump(tmp_path / 'config.py')
    return write_checkpoint(config, tmp_path / 'weights.pth', CLASSES), tmp_path / 'config.py'


def test_what_has_no_page_is_said(app, checkpoint, several_labels, monkeypatch):
    monkeypatch.setattr(app, 'release_memory', lambda: None)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv('GRADIO_TEMP_DIR', '')
    for arguments, error in (
        (['none.onnx'], 'no exported file at none.onnx'),
        (['a.pth'], 'a checkpoint needs its config as the second argument, but got only a.pth'),
        (['a.onnx', 'b.py'], 'an exported file needs no config, but got b.py besides a.onnx'),
        (['a.pt2'], 'the page opens .onnx and .xml files, not .pt2, which runs code, but got a.pt2'),
        (['a.onnx', '--layer', 'backbone'], '--layer needs a checkpoint, but got a.onnx'),
        (['a.onnx', '--port', '99999'], '--port must be from 1 to 65535, but got 99999'),
        (
            [checkpoint, CONFIG, '--layer', 'neck'],
            r'--layer must output maps \(N, C, H, W\), but Grad-CAM fails on neck: .*',
        ),
        (several_labels, 'only single-label classifiers can be exported, but the head is MultiLabelLinearClsHead'),
    ):
        with (
            mock.patch('sys.argv', ['app.py', *map(str, arguments)]),
            mock.patch('signal.signal'),
            pytest.raises(SystemExit, match=f'^Error: {error}$'),
        ):
            app.main()


def test_the_layer_of_grad_cam(app):
    """The last norm of the backbone, or its last layer if it has no norm."""
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    assert app.find_layer(model, None) is model.backbone[1] and app.find_layer(model, 'backbone.0') is model.backbone[0]
    with pytest.raises(ValueError, match='--layer must be the name of a layer, such as backbone.1, but got x'):
        app.find_layer(model, 'x')
    model.backbone.insert(1, torch.nn.BatchNorm2d(4))
    assert app.find_layer(model, None) is model.backbone[1]


def test_without_a_model_the_page_recognizes_digits(app, monkeypatch):
    opened = []
    monkeypatch.setattr('sys.argv', ['app.py'])
    monkeypatch.setattr(app, 'serve', lambda args: opened.append(app.open_checkpoint(args.model, args.config, None)))
    monkeypatch.setattr(app, 'release_memory', lambda: None)
    monkeypatch.setattr(app.signal, 'signal', lambda *_: None)
    monkeypatch.setattr(app.Image, 'MAX_IMAGE_PIXELS', None)
    app.main()
    (task, classes, predict), (images, labels, _) = opened[0], split_digits()['test']
    found = [predict(np.repeat(image[..., None], 3, axis=2)) for image in images[:10]]
    right = [classes[one['pred_scores'].argmax()] == str(label) for one, label in zip(found, labels)]
    assert task == 'classifier' and sum(right) >= 9 and found[0]['overlay'].size == (320, 320)
