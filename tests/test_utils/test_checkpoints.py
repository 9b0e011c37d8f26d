"""Checkpoint files that run no code."""

import pickle

import numpy as np
import pytest
import torch
from helpers import Malicious
from mmengine.logging import HistoryBuffer

from mmstrip.utils.checkpoints import read_checkpoint, restore_histories, to_plain, write_checkpoint


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
