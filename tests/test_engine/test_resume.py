"""Trainings that are killed, starved of disk or asked to stop, and go on as if nothing had happened."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import CONFIG, children, fail, finish, log, start

from mmstrip.engine.hooks.checkpoint import STOPPED

EPOCHS = 24
SETTINGS = {'randomness.seed': 5, 'train_cfg.max_epochs': EPOCHS}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> dict:
    """The last checkpoint of a run that nobody disturbs."""
    return finish(tmp_path_factory.mktemp('undisturbed'), SETTINGS)


def assert_same_end(checkpoint: dict, expected: dict) -> None:
    """Weights, their average, optimizer, schedules and what was validated are the same, bit for bit."""
    for part in ('state_dict', 'ema_state_dict'):
        assert checkpoint[part].keys() == expected[part].keys()
        different = [name for name, value in expected[part].items() if not torch.equal(value, checkpoint[part][name])]
        assert not different
    for index, state in expected['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(value, checkpoint['optimizer']['state'][index][name])
    assert checkpoint['param_schedulers'] == expected['param_schedulers']
    for name in ('train/loss', 'val/accuracy/top1'):
        one, other = (part['message_hub']['log_scalars'][name]['history'] for part in (checkpoint, expected))
        assert torch.equal(one, other), name


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob('.*.tmp'))


def wait_until(condition, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while process.is_alive() and not condition() and time.monotonic() < end:
        time.sleep(0.0005)


def steps(folder: Path) -> int:
    return log(folder).count('Epoch(train)')


def start_and_train(folder: Path, iterations: int):
    """A process that goes on with the run and has trained so many more iterations."""
    goal = steps(folder) + iterations
    process = start(folder, SETTINGS)
    wait_until(lambda: steps(folder) >= goal, process)
    return process


def test_twenty_kills_change_nothing(tmp_path, undisturbed):
    """kill -9 at random moments and, every other time, in the middle of writing a checkpoint."""
    moments, during_save = random.Random(0), 0
    for number in range(20):
        process = start_and_train(tmp_path, moments.randint(1, 4))
        if number % 2:
            wait_until(lambda: unfinished(tmp_path), process)
        else:
            time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        during_save += bool(unfinished(tmp_path))
    assert during_save >= 3
    last = finish(tmp_path, SETTINGS)
    assert log(tmp_path).count('Resuming from') >= 10
    assert_same_end(last, undisturbed)
    # What the kills have left is gone, and old checkpoints are too.
    assert not unfinished(tmp_path)
    assert {file.name for file in tmp_path.glob('epoch_*')} == {f'epoch_{EPOCHS - 1}.pth', f'epoch_{EPOCHS}.pth'}
    assert len(list(tmp_path.glob('best_*'))) == 1


def test_sigterm_saves_inside_an_epoch(tmp_path, undisturbed):
    """Also where the cluster sends it to the workers of the dataloader, and again and again."""
    inside = 0
    for iterations in (4, 4, 5):
        process = start_and_train(tmp_path, iterations)
        for child in children(process.pid):
            os.kill(child, signal.SIGTERM)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == STOPPED == 143, log(tmp_path)[-2000:]
        assert 'SIGTERM: saving interrupted.pth' in log(tmp_path)
        inside += 'batches_done' in torch.load(tmp_path / 'interrupted.pth', weights_only=True)['meta']
    assert inside  # others may have waited for the end of a validation
    assert_same_end(finish(tmp_path, SETTINGS), undisturbed)
    assert not (tmp_path / 'interrupted.pth').exists()


BY_ITERATIONS = f"""
_base_ = [{str(CONFIG)!r}]
train_dataloader = dict(sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=25, val_interval=4)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4))
log_processor = dict(by_epoch=False)
"""


def test_training_by_iterations_goes_on_at_any_iteration(tmp_path):
    """As segmentors are trained: an endless sampler, and the batches that were trained are not loaded again."""
    config = tmp_path / 'iterations.py'
    config.write_text(BY_ITERATIONS)
    options = {'randomness.seed': 2}
    undisturbed = finish(tmp_path / 'one', options, config=config)
    stopped = tmp_path / 'two'
    for number, stop in enumerate((signal.SIGTERM, signal.SIGKILL)):
        process = start(stopped, options, config=config)
        wait_until(lambda goal=6 + 8 * number: log(stopped).count('Iter(train)') >= goal, process)
        os.kill(process.pid, stop)
        process.join(60)
        assert process.exitcode == (STOPPED if stop == signal.SIGTERM else -stop)
    assert_same_end(finish(stopped, options, config=config), undisturbed)
    assert 'slower' not in log(stopped)


def test_full_disk_and_damaged_checkpoints(tmp_path, undisturbed):
    process = start_and_train(tmp_path, 8)
    process.kill()
    process.join()
    before = {file.name: file.read_bytes() for file in tmp_path.glob('*.pth')}
    # The system refuses files above 64 KiB, as a full disk would.
    output = fail(tmp_path, SETTINGS, file_limit=2**16)
    name = re.search(r'OSError: .*cannot write .*/(epoch_\d+.pth): File too large; nothing else is lost', output).group(
        1
    )
    assert name not in before
    assert {file.name: file.read_bytes() for file in tmp_path.glob('*.pth')} == before
    assert not unfinished(tmp_path)

    newest = Path((tmp_path / 'last_checkpoint').read_text())
    newest.write_bytes(newest.read_bytes()[:-5000])
    (tmp_path / 'iter_9.pth').write_text('no checkpoint')
    last = finish(tmp_path, SETTINGS)
    for damaged in (newest, tmp_path / 'iter_9.pth'):
        assert f'going back to the one before: {damaged} cannot be loaded' in log(tmp_path)
    assert_same_end(last, undisturbed)


def test_only_damaged_checkpoints(tmp_path):
    """Nothing is overwritten by a training that would start from scratch."""
    (tmp_path / 'epoch_3.pth').write_text('no checkpoint')
    output = fail(tmp_path, SETTINGS)
    assert f'ValueError: no checkpoint in {tmp_path} can be read: {tmp_path}/epoch_3.pth cannot be loaded' in output
    assert (tmp_path / 'epoch_3.pth').read_text() == 'no checkpoint'


WRAPPED = f"""
_base_ = [{str(CONFIG)!r}]
custom_imports = dict(imports=['helpers.wrapping'])
custom_hooks = [dict(type='WrapBlockHook', priority='VERY_HIGH'), *_base_.custom_hooks]
"""


def test_wrapped_blocks_are_saved_and_resumed(tmp_path):
    """Under torch's checkpoint_wrapper parameters have other names than in the state dict."""
    config = tmp_path / 'wrapped.py'
    config.write_text(WRAPPED)
    options = {'randomness.seed': 3}
    undisturbed = finish(tmp_path / 'one', options, config=config)
    stopped = tmp_path / 'two'
    process = start(stopped, options, config=config)
    wait_until(lambda: steps(stopped) >= 5, process)
    process.terminate()
    process.join(60)
    assert process.exitcode == STOPPED, log(stopped)[-2000:]
    assert_same_end(finish(stopped, options, config=config), undisturbed)
    assert 'backbone.stages.0.0.strip_mixing.fuse.weight' in undisturbed['state_dict']
