"""Checkpoint files that run no code."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from helpers import Malicious
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import load_file

from mmstrip.utils.checkpoints import (
    fill_model,
    load_plain_weights_only,
    load_whole,
    read_checkpoint,
    restore_histories,
    to_plain,
    write_checkpoint,
)


def test_plain_pickles_are_refused(tmp_path):
    (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(Malicious(tmp_path / 'ran')))
    with pytest.raises(ValueError, match='cannot be loaded as plain weights'):
        read_checkpoint(tmp_path / 'evil.pkl')
    assert not (tmp_path / 'ran').exists()


def test_checkpoints_of_the_model_zoos_are_read(tmp_path):
    """They hold histories of losses and NumPy numbers, which run nothing."""
    history = HistoryBuffer([1.0, 0.5], [1, 1])
    content = dict(message_hub=dict(log_scalars={'train/loss': history}), best=np.float64(0.5), ids=np.arange(3))
    torch.save(content, tmp_path / 'zoo.pth')
    loaded = read_checkpoint(tmp_path / 'zoo.pth')
    assert loaded['message_hub']['log_scalars']['train/loss'].current() == 0.5 and loaded['best'] == 0.5

    write_checkpoint(to_plain({**content, 'function': print, 'nested': [print, (1, 'a')]}), tmp_path / 'ours.pth')
    ours = torch.load(tmp_path / 'ours.pth', weights_only=True)
    assert ours['nested'] == [(1, 'a')] and 'function' not in ours and ours['ids'].tolist() == [0, 1, 2]
    assert restore_histories(ours)['message_hub']['log_scalars']['train/loss'].current() == 0.5


def test_a_filled_model_is_all_that_changes(tmp_path):
    layer, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    torch.save(dict(state_dict=other.state_dict(), meta={}), tmp_path / 'whole.pth')
    torch.save(other.weight.detach(), tmp_path / 'weight.pth')
    environment = dict(os.environ)
    assert fill_model(layer, 'layer.py', tmp_path / 'whole.pth')['meta'] == {}
    assert torch.equal(layer.weight, other.weight) and dict(os.environ) == environment
    with pytest.raises(ValueError, match='weight.pth does not fill the model of layer.py: it lacks 2 .* weight, bias'):
        fill_model(layer, 'layer.py', tmp_path / 'weight.pth')
    larger = torch.nn.Linear(2, 4).state_dict()
    torch.save({f'module.{key}': value for key, value in larger.items()}, tmp_path / 'larger.pth')
    with pytest.raises(ValueError, match=r'larger.pth .* has tensors of other shapes: .* weight: .*\[4, 2\].*\[3, 2\]'):
        fill_model(layer, 'layer.py', tmp_path / 'larger.pth')


def test_counts_that_pytorch_fills_itself_may_be_missing(tmp_path):
    norm, weights = torch.nn.BatchNorm2d(3), dict(torch.nn.BatchNorm2d(3).state_dict())
    del weights['num_batches_tracked']
    assert load_whole(norm, weights) == ''
    del weights['running_var']
    assert 'lacks 1' in load_whole(norm, weights)


def test_safetensors(tmp_path, monkeypatch):
    content = dict(state_dict=dict(weight=torch.arange(6.0).view(2, 3).t()), meta=dict(classes=['cat', 'dog']))
    write_checkpoint(content, tmp_path / 'ours.safetensors')
    loaded = read_checkpoint(tmp_path / 'ours.safetensors')
    assert torch.equal(loaded['state_dict']['weight'], content['state_dict']['weight'])
    assert loaded['meta'] == content['meta']
    assert torch.equal(load_file(tmp_path / 'ours.safetensors')['weight'], content['state_dict']['weight'])
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')  # what follows sets it too; undone with it
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    load_plain_weights_only()
    layer = torch.nn.Linear(2, 3, bias=False)
    load_checkpoint(layer, str(tmp_path / 'ours.safetensors'))
    assert torch.equal(layer.weight, content['state_dict']['weight'])

    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'ours.safetensors').read_bytes()[:20])
    with pytest.raises(ValueError, match='cut.safetensors is damaged or no safetensors file: .'):
        read_checkpoint(tmp_path / 'cut.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='pip install safetensors'):
        read_checkpoint(tmp_path / 'ours.safetensors')
