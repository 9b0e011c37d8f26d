"""What may be saved."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import train_here
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmstrip.engine.hooks import PlainCheckpointHook


@pytest.fixture
def runner():
    model = torch.nn.BatchNorm2d(2)
    model.register_buffer('mask', torch.tensor([0.0, -torch.inf]))
    return SimpleNamespace(model=model, iter=7, work_dir='work', logger=logging.getLogger('said'))


@pytest.mark.parametrize('part', ['state_dict', 'ema_state_dict'])
@pytest.mark.parametrize('name', ['weight', 'running_mean', 'running_var'])
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_saved(runner, part, name, value):
    """Parameters, statistics of BN and averages; a mask may be infinite."""
    hook, prefix = PlainCheckpointHook(), 'module.' if part == 'ema_state_dict' else ''
    hook.before_run(runner)
    state = {prefix + key: tensor.clone() for key, tensor in runner.model.state_dict().items()}
    checkpoint = {'state_dict': {}, part: state}
    hook.before_save_checkpoint(runner, checkpoint)
    checkpoint[part][prefix + name][1] = value
    words = f'{name} contains NaN or infinite values at iteration 7. Nothing was saved; the checkpoints in work are'
    with pytest.raises(FloatingPointError, match=words):
        hook.before_save_checkpoint(runner, checkpoint)


def test_losses_are_named_once_and_weights_are_not_dropped(runner, caplog):
    hook = PlainCheckpointHook()
    for _ in range(2):
        checkpoint = dict(state_dict={}, mine=dict(path=Path('a'), good=1), own=Path('b'))
        hook.before_save_checkpoint(runner, checkpoint)
        assert checkpoint == dict(state_dict={}, mine=dict(good=1))
    assert sorted(caplog.messages) == [
        'Checkpoints: mine.path is not saved, because a PosixPath needs code to load',
        'Checkpoints: own is not saved, because a PosixPath needs code to load',
    ]
    weight = torch.ones(2).as_subclass(type('ShardTensor', (torch.Tensor,), {}))
    with pytest.raises(TypeError, match='state_dict.weight is not saved, because a ShardTensor .* Convert it'):
        hook.before_save_checkpoint(runner, dict(state_dict=dict(weight=weight)))


@HOOKS.register_module(force=True)
class OwnValuesHook(Hook):
    """As users write them: after all others, and into the message hub too."""

    priority = 'LOWEST'
    came_back = None

    def before_train(self, runner) -> None:
        info = runner.message_hub.runtime_info
        OwnValuesHook.came_back = {key: info.get(key) for key in ('array', 'set', 'pair', 'range')}
        for key, value in dict(array=np.arange(3), set={1}, pair=(1, 2), range=range(2)).items():
            runner.message_hub.update_info(key, value)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['own'] = dict(path=Path('a'), arrays=[np.ones(2)])

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        assert checkpoint['own'].keys() == {'arrays'} and checkpoint['own']['arrays'][0].tolist() == [1, 1]


def test_a_run_with_values_of_its_own_is_resumed(tmp_path):
    options = {'custom_hooks': [dict(type='OwnValuesHook')]}
    _, warnings = train_here(tmp_path, options)
    for key in ('own.path', 'message_hub.runtime_info.range'):
        assert f'Checkpoints: {key} is not saved, because a ' in warnings
    torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    train_here(tmp_path, options)
    found = OwnValuesHook.came_back
    assert type(found['array']) is np.ndarray and found['array'].tolist() == [0, 1, 2]
    assert (found['set'], found['pair'], found['range']) == ({1}, (1, 2), None)
