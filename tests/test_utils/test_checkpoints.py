"""Checkpoint files that run no code."""

import os
import pickle
import re
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, Malicious, blocks, randomise, small_backbone
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import load_file, save_file

from mmstrip.converters.official import convert_official_checkpoint
from mmstrip.utils.checkpoints import (
    load_full_checkpoint,
    load_full_state_dict,
    load_plain_weights_only,
    read_checkpoint,
    write_checkpoint,
)


@pytest.fixture
def plain_weights_only(monkeypatch):
    """As in the process of a Runner; undone afterwards."""
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    load_plain_weights_only()


def test_plain_pickles_are_refused(tmp_path):
    (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(Malicious(tmp_path / 'ran')))
    with pytest.raises(ValueError, match='cannot be loaded: it is damaged or not a PyTorch checkpoint'):
        read_checkpoint(tmp_path / 'evil.pkl')
    assert not (tmp_path / 'ran').exists()


def test_checkpoints_of_the_model_zoos_are_read(tmp_path):
    """They hold histories of losses and NumPy numbers, which run nothing."""
    history = HistoryBuffer([1.0, 0.5], [1, 1])
    content = dict(message_hub=dict(log_scalars={'train/loss': history}), best=np.float64(0.5), ids=np.arange(3))
    torch.save(content, tmp_path / 'zoo.pth')
    loaded = read_checkpoint(tmp_path / 'zoo.pth')
    assert loaded['message_hub']['log_scalars']['train/loss'].current() == 0.5 and loaded['best'] == 0.5


def test_a_filled_model_is_all_that_changes(tmp_path):
    layer, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    torch.save(dict(state_dict=other.state_dict(), meta={}), tmp_path / 'whole.pth')
    torch.save(other.weight.detach(), tmp_path / 'weight.pth')
    environment = dict(os.environ)
    assert load_full_checkpoint(layer, 'layer.py', tmp_path / 'whole.pth')['meta'] == {}
    assert torch.equal(layer.weight, other.weight) and dict(os.environ) == environment
    with pytest.raises(ValueError, match='weight.pth does not fit the model of layer.py: it lacks 2 .* weight, bias'):
        load_full_checkpoint(layer, 'layer.py', tmp_path / 'weight.pth')
    larger = torch.nn.Linear(2, 4).state_dict()
    torch.save({f'module.{key}': value for key, value in larger.items()}, tmp_path / 'larger.pth')
    with pytest.raises(ValueError, match=r'larger.pth .* has tensors of other shapes: .* weight: .*\[4, 2\].*\[3, 2\]'):
        load_full_checkpoint(layer, 'layer.py', tmp_path / 'larger.pth')


def test_counts_that_pytorch_fills_itself_may_be_missing(tmp_path):
    norm, weights = torch.nn.BatchNorm2d(3), dict(torch.nn.BatchNorm2d(3).state_dict())
    del weights['num_batches_tracked']
    assert load_full_state_dict(norm, weights) == ''
    del weights['running_var']
    assert 'lacks 1' in load_full_state_dict(norm, weights)


def test_safetensors(tmp_path, monkeypatch, plain_weights_only):
    content = dict(state_dict=dict(weight=torch.arange(6.0).view(2, 3).t()), meta=dict(classes=['cat', 'dog']))
    write_checkpoint(content, tmp_path / 'ours.safetensors')
    loaded = read_checkpoint(tmp_path / 'ours.safetensors')
    assert torch.equal(loaded['state_dict']['weight'], content['state_dict']['weight'])
    assert loaded['meta'] == content['meta']
    assert torch.equal(load_file(tmp_path / 'ours.safetensors')['weight'], content['state_dict']['weight'])
    layer = torch.nn.Linear(2, 3, bias=False)
    load_checkpoint(layer, str(tmp_path / 'ours.safetensors'))
    assert torch.equal(layer.weight, content['state_dict']['weight'])

    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'ours.safetensors').read_bytes()[:20])
    with pytest.raises(ValueError, match='cut.safetensors is damaged or not a safetensors file: .'):
        read_checkpoint(tmp_path / 'cut.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='pip install safetensors'):
        read_checkpoint(tmp_path / 'ours.safetensors')


@pytest.mark.parametrize('meta', ['no JSON', '[1]', '"a"', '[' * 100_000])
def test_safetensors_with_other_metadata(meta, tmp_path):
    save_file(dict(weight=torch.ones(2)), tmp_path / 'odd.safetensors', {'meta': meta})
    with pytest.raises(ValueError, match=r"odd.safetensors: 'meta' in its header must be a JSON object$"):
        read_checkpoint(tmp_path / 'odd.safetensors')


def test_damage_inside_of_a_tensor_is_noticed(tmp_path, plain_weights_only):
    """torch.load gives wrong weights without a word."""
    path, weights = tmp_path / 'lost.pth', dict(state_dict=dict(weight=torch.rand(100, 100)))
    torch.save(weights, path)
    assert torch.equal(read_checkpoint(path)['state_dict']['weight'], weights['state_dict']['weight'])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)  # as a lost block of a disk
    path.write_bytes(content)
    assert (torch.load(path)['state_dict']['weight'] == 0).sum() >= 1000
    words = r'lost.pth cannot be loaded: it is damaged \(wrong checksum of lost/data/0\)$'
    for trusted in (False, True):
        with pytest.raises(ValueError, match=words):
            read_checkpoint(path, trusted=trusted)
    for read in (CheckpointLoader.load_checkpoint, convert_official_checkpoint):  # init_cfg, load_from; converters
        with pytest.raises(ValueError, match=words):
            read(str(path), str(tmp_path / 'out.pth'))


def test_any_damaged_byte_of_the_list_of_parts_is_harmless_or_refused_by_name(tmp_path):
    """One of them lets PyTorch take a tensor from whatever is in the memory."""
    path, weight = tmp_path / 'file.pth', torch.arange(50.0)
    torch.save(dict(weight=weight), path)
    content = path.read_bytes()
    for place in range(content.index(b'PK\1\2'), len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            assert torch.equal(read_checkpoint(path)['weight'], weight)
        except ValueError as error:
            assert str(error).startswith(f'{path} cannot be loaded') and '\n' not in str(error)


def test_files_without_checksums_are_read(tmp_path):
    """Older than PyTorch 1.6, as some of model zoos, or written without on purpose."""
    torch.save(dict(weight=torch.ones(2)), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    names = ['old']
    if hasattr(torch.serialization, 'set_crc32_options'):  # from PyTorch 2.6 on
        torch.serialization.set_crc32_options(False)
        torch.save(dict(weight=torch.ones(2)), tmp_path / 'without.pth')
        torch.serialization.set_crc32_options(True)
        names.append('without')
    for name in names:
        assert read_checkpoint(tmp_path / f'{name}.pth')['weight'].tolist() == [1, 1]


@pytest.mark.parametrize('method', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_files_are_refused_before_they_fill_the_memory(method, tmp_path):
    torch.save(dict(weight=torch.zeros(2_000_000)), tmp_path / 'plain.pth')
    with zipfile.ZipFile(tmp_path / 'plain.pth') as plain, zipfile.ZipFile(tmp_path / 'small.pth', 'w') as small:
        for entry in plain.infolist():
            big = entry.filename.endswith('data/0')
            small.writestr(entry.filename, plain.read(entry), method if big else zipfile.ZIP_STORED)
    assert (tmp_path / 'small.pth').stat().st_size < 100_000
    with (
        mock.patch('torch.load') as load,
        pytest.raises(ValueError, match='small.pth cannot be loaded: it is compressed'),
    ):
        read_checkpoint(tmp_path / 'small.pth')
    assert not load.called


def test_weights_of_other_projects_are_understood(tmp_path, plain_weights_only):
    other, path = torch.nn.Linear(2, 3), tmp_path / 'other.pth'
    weights = other.state_dict()
    compiled = {f'_orig_mod.{key}': value for key, value in weights.items()}
    parallel = {f'module.{key}': value for key, value in compiled.items()}
    for content in (dict(model=weights, epoch=3), compiled, dict(state_dict=compiled), dict(model=parallel)):
        torch.save(content, path)
        for load in (
            lambda layer: load_checkpoint(layer, str(path)),
            lambda layer: load_full_checkpoint(layer, 'layer.py', path),
        ):
            layer = torch.nn.Linear(2, 3)
            load(layer)
            assert torch.equal(layer.weight, other.weight)
    compiled, plain = (torch.nn.ModuleDict() for _ in range(2))  # the layer, not the whole model
    compiled['layer'] = torch.nn.ModuleDict(dict(_orig_mod=torch.nn.Linear(2, 3)))
    plain['layer'] = other
    assert load_full_state_dict(compiled, plain.state_dict()) == ''
    assert torch.equal(compiled['layer']['_orig_mod'].weight, other.weight)
    plain['layer'] = torch.nn.Linear(2, 3)
    assert load_full_state_dict(plain, compiled.state_dict()) == '' and torch.equal(plain['layer'].weight, other.weight)


def test_addresses(tmp_path, monkeypatch, plain_weights_only):
    """Downloaded once, and read as files are."""
    served = tmp_path / 'served'
    served.mkdir()
    weights = dict(state_dict=dict(weight=torch.ones(2)), meta={})
    for suffix in ('pth', 'safetensors'):
        write_checkpoint(weights, served / f'ours.{suffix}')
    torch.save(dict(evil=Malicious(tmp_path / 'ran')), served / 'evil.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        for _ in range(2):
            for suffix in ('pth', 'safetensors'):
                loaded = CheckpointLoader.load_checkpoint(f'{address}/ours.{suffix}?download=true')
                assert loaded['state_dict']['weight'].tolist() == [1, 1]
                (served / f'ours.{suffix}').unlink(missing_ok=True)
        with pytest.raises(OSError, match=f'cannot download {address}/none.pth: HTTP Error 404'):
            CheckpointLoader.load_checkpoint(f'{address}/none.pth')
        with pytest.raises(ValueError, match=r'evil.pth cannot be loaded safely .* could run code'):
            CheckpointLoader.load_checkpoint(f'{address}/evil.pth')
        server.shutdown()
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('channels', [1, 4, 6])
def test_the_recipe_for_other_numbers_of_channels(channels, tmp_path, monkeypatch):
    """Of docs/model_zoo.md, which the error of such a checkpoint names: equal channels give the old features."""
    monkeypatch.chdir(tmp_path)
    start, end = (tmp_path / 'checkpoints' / f'strip-mlp-tiny_in1k{name}.pth' for name in ('', '_other-channels'))
    start.parent.mkdir()
    model = randomise(small_backbone()).eval()
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in model.state_dict().items()}, meta={}), start)
    (recipe,) = (block for block in blocks(ROOT / 'docs/model_zoo.md', 'python') if 'patch_embed.weight' in block)
    exec(recipe.replace('channels = 4', f'channels = {channels}'), {})
    init = dict(type='Pretrained', checkpoint=str(start), prefix='backbone.')
    words = f'in_channels=3, but the model has in_channels={channels}; docs/model_zoo.md ("Other channels") shows how'
    with pytest.raises(ValueError, match=re.escape(words)):
        small_backbone(in_channels=channels, init_cfg=init).init_weights()
    other = small_backbone(in_channels=channels, init_cfg=dict(init, checkpoint=str(end))).eval()
    other.init_weights()
    gray = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(gray.repeat(1, channels, 1, 1)), model(gray.repeat(1, 3, 1, 1)))
