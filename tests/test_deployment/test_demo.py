"""The demo's page through its own API client, started as users start it."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import ROOT, last_line
from helpers.exports import CLASSES, SCENES, SMALL_SCENES, write_checkpoint, write_detector
from helpers.runs import CONFIG, call_tool
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

from mmstrip.deployment import Export, export_model, load
from mmstrip.utils.config import load_config

DEMO = ROOT / 'demo' / 'app.py'
NAMES = [f'pair {i // 2}' for i in range(10)]  # each of two classes


def start(folder: Path, *arguments) -> tuple[subprocess.Popen, str]:
    port = str(get_free_port())
    command = [sys.executable, DEMO, *arguments, '--port', port]
    with (folder / 'page.txt').open('w') as output:
        environment = dict(os.environ, TMPDIR=str(folder))
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=environment)
    return process, f'http://127.0.0.1:{port}/'


def connect(process: subprocess.Popen, address: str, folder: Path) -> Client:
    for _ in range(1500):
        assert process.poll() is None, (folder / 'page.txt').read_text()
        try:
            httpx.get(address)
            return Client(address, verbose=False, download_files=str(folder), httpx_kwargs=dict(timeout=300))
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError('the page has not come')


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    """Of a classifier's checkpoint and of a segmentor's and a detector's exported file: clients, processes, folders."""
    folders = [tmp_path_factory.mktemp(name) for name in ('classifier', 'segmentor', 'detector')]
    weights = write_checkpoint(load_config(str(CONFIG)), folders[0] / 'weights.pth', NAMES)
    first = start(folders[0], weights, CONFIG, '--layer', 'backbone.stages.1')
    checkpoint = write_checkpoint(load_config(SCENES, SMALL_SCENES), folders[1] / 'weights.pth', list('abcdefghijk'))
    file = folders[1] / 'scenes.onnx'
    export_model(SCENES, checkpoint, file, Export(shape=(64, 96)), SMALL_SCENES)
    second = start(folders[1], file)
    export_model(*write_detector('MaskRCNN', folders[2], spread=4), folders[2] / 'masks.onnx', Export())
    started = (first, second, start(folders[2], folders[2] / 'masks.onnx'))
    try:
        yield [(connect(*page, folder), page[0], folder) for page, folder in zip(started, folders)]
        for process, _ in started:
            process.terminate()
            process.wait(60)
        assert not [path for folder in folders for path in folder.glob('mmstrip-page-*')]
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture') / 'picture.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


def memory(process: subprocess.Popen) -> float:
    """MiB."""
    return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{process.pid}/status').read_text())[1]) / 1024


def test_classes_and_where_a_classifier_looks(pages, picture):
    from mmpretrain import ImageClassificationInferencer

    client, process, folder = pages[0]
    inferencer = ImageClassificationInferencer(str(CONFIG), pretrained=str(folder / 'weights.pth'), device='cpu')
    deep = folder / 'deep.png'  # of 16 bits
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (64, 96), dtype=np.uint16)).save(deep)
    for path in (deep, picture):
        label, overlay = client.predict(handle_file(path), api_name='/predict')
        (expected,) = inferencer(str(path))
        assert label['label'] == f'{expected["pred_class"]} ({expected["pred_label"]})'
        found = [part['confidence'] for part in label['confidences']]
        np.testing.assert_allclose(found, np.sort(expected['pred_scores'])[:-6:-1], atol=1e-4)
    heat = np.asarray(Image.open(overlay))
    assert heat.shape == (320, 320, 3) and heat.std() > 5
    before = memory(process)
    for _ in range(30):
        client.predict(handle_file(picture), api_name='/predict')
    assert memory(process) < before + 20


def test_masks_of_a_segmentor(pages, picture):
    client, _, folder = pages[1]
    shown = client.predict(handle_file(picture), api_name='/predict')
    labels = load(folder / 'scenes.onnx')(str(picture))[0]
    assert [part['label'] for part in shown['annotations']] == ['abcdefghijk'[i] for i in np.unique(labels)]
    for part, i in zip(shown['annotations'], np.unique(labels)):
        drawn = np.asarray(Image.open(part['image']))[..., 3] > 0
        assert ((labels == i) == drawn).mean() > 0.99


def test_boxes_and_masks_of_a_detector(pages, picture):
    client, _, folder = pages[2]
    shown = client.predict(handle_file(picture), api_name='/predict')['annotations']
    found = load(folder / 'masks.onnx')(str(picture))[0]
    likely = found['scores'] >= 0.3
    labels, counts = np.unique(found['labels'][likely], return_counts=True)
    assert len(labels) and [part['label'] for part in shown] == [f'{CLASSES[i]}: {n}' for i, n in zip(labels, counts)]
    for part, i in zip(shown, labels):
        drawn = np.asarray(Image.open(part['image']))[..., 3]
        mine = likely & (found['labels'] == i)
        assert drawn.shape == (64, 96) and (drawn[found['masks'][mine].any(0)] >= 127).all()
        for x0, y0, x1, y1 in found['bboxes'][mine].astype(int):
            assert (drawn[y0 : y0 + 3, x0 + 2 : x1 - 1].max(0) == 255).all()
            assert (drawn[y0 + 2 : y1 - 1, x0 : x0 + 3].max(1) == 255).all()


def test_what_cannot_be_shown_is_said(pages, picture, tmp_path):
    client = pages[0][0]
    Image.new('1', (6000, 6000)).save(tmp_path / 'bomb.png')  # 5 kB
    (tmp_path / 'broken.png').write_bytes(picture.read_bytes()[:5000])
    (tmp_path / 'words.jpg').write_text('no picture')
    for name, words in (
        ('bomb.png', r'Image size \(36000000 pixels\) exceeds limit of 25000000 pixels'),
        ('broken.png', 'image file is truncated'),
        ('words.jpg', 'cannot identify image file'),
    ):
        with pytest.raises(AppError, match=f'^This file cannot be read as a picture: {words}'):
            client.predict(handle_file(tmp_path / name), api_name='/predict')
    assert httpx.post(client.upload_url, files=dict(files=bytes(11 * 2**20))).status_code == 413
    assert client.predict(handle_file(picture), api_name='/predict')[0]['label'].startswith('pair')


ONLY = 'Only pictures that were uploaded to this page are read: upload it again'
MARK = {'_type': 'gradio.FileData'}


def post(address: str, payload) -> tuple[str, dict]:
    """What an answer to a raw request is, and holds."""
    called = httpx.post(f'{address}gradio_api/call/predict', json=dict(data=[payload]), timeout=60)
    lines = httpx.get(f'{address}gradio_api/call/predict/{called.json()["event_id"]}', timeout=60).text.split('\n')
    return lines[0].removeprefix('event: '), json.loads(lines[1].removeprefix('data: '))


def test_nothing_but_uploads_is_read(pages, picture, tmp_path):
    """By raw requests, with Gradio's mark of an upload and without."""
    client, _, folder = pages[2]
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
    elsewhere = (
        *(str(picture), str(tmp_path / 'none.png'), f'{own}/../../{picture.name}', f'{own}/link.png', str(own), ''),
        *(other, 'http://93.184.215.14/x.png', 'https://example.com/x.png', f'{address}gradio_api/file={path}'),
        *(
            f'file://{picture}',
            'data:image/png;base64,iVBORw0KGgo=',
            'a\0b',
            'a' * 5000,
            None,
            5,
            [path],
            {'path': path},
        ),
    )
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


def test_bursts_are_refused_beyond_what_may_wait_and_keep_no_memory(pages, tmp_path):
    client, process, _ = pages[2]
    Image.new('RGB', (4500, 4500)).save(tmp_path / 'slow.jpg')  # slower to show than to send
    before = memory(process)
    for _ in range(2):
        jobs = [client.submit(handle_file(tmp_path / 'slow.jpg'), api_name='/predict') for _ in range(20)]
        errors = [str(job.exception(300)) for job in jobs if job.exception(300)]
        assert errors and all('full' in error for error in errors) and len(errors) < 20, errors
    assert memory(process) < before + 100  # 400 MiB if glibc keeps them


def test_what_has_no_page_is_said(tmp_path):
    config = load_config(str(CONFIG))
    config.model.head = dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=128)
    config.dump(tmp_path / 'config.py')
    weights = write_checkpoint(config, tmp_path / 'weights.pth', CLASSES)
    for arguments, error in (
        ([tmp_path / 'none.onnx'], f'no exported file at {tmp_path}/none.onnx'),
        ([weights], f'a checkpoint needs its config after it, but got {weights} and None'),
        (['a.onnx', CONFIG], f'exported files have no config beside them, but got a.onnx and {CONFIG}'),
        (['a.pt2'], 'the page shows .onnx and .xml, as .pt2 files run code, but got a.pt2'),
        (['a.onnx', '--layer', 'backbone'], '--layer is for checkpoints, but got a.onnx'),
        (['a.onnx', '--port', '99999'], '--port must be from 1 to 65535, but got 99999'),
        (
            [weights, tmp_path / 'config.py'],
            'classifiers of one label are exported, but the head is MultiLabelLinearClsHead',
        ),
    ):
        done = call_tool(DEMO, *arguments, folder=tmp_path)
        assert done.returncode == 1 and last_line(done.stdout) == f'Error: {error}', done.stdout
