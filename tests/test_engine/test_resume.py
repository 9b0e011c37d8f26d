"""Trainings that are killed, starved of disk or asked to stop, and resume as if nothing had happened."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.kills import assert_same_end, kill_repeatedly, start_and_train, steps, unfinished, wait_until
from helpers.runs import CONFIG, children, fail, finish, log, start

from mmstrip.engine.hooks.checkpoint import SIGTERM_EXIT_CODE

EPOCHS = 8
SETTINGS = {'randomness.seed': 5, 'train_cfg.max_epochs': EPOCHS}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> dict:
    """The last checkpoint of a run that nobody disturbs."""
    return finish(tmp_path_factory.mktemp('undisturbed'), SETTINGS)


def test_kills_change_nothing(tmp_path, undisturbed):
    """Four here, twenty in `make soak`; half of them in the middle of writing a checkpoint."""
    assert kill_repeatedly(tmp_path, SETTINGS, kills=4) >= 1
    last = finish(tmp_path, SETTINGS)
    assert log(tmp_path).count('Resuming from') >= 2
    assert_same_end(last, undisturbed)
    # What the kills have left is gone, and old checkpoints are too.
    assert not unfinished(tmp_path)
    assert {file.name for file in tmp_path.glob('epoch_*')} == {f'epoch_{EPOCHS - 1}.pth', f'epoch_{EPOCHS}.pth'}
    assert len(list(tmp_path.glob('best_*'))) == 1


def test_sigterm_saves_inside_an_epoch(tmp_path, undisturbed):
    """Also where the cluster sends it to the workers of the dataloader, and again and again."""
    inside = 0
    for iterations in (4, 5):
        process = start_and_train(tmp_path, SETTINGS, iterations)
        for child in children(process.pid):
            os.kill(child, signal.SIGTERM)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == SIGTERM_EXIT_CODE == 143, log(tmp_path)[-2000:]
        assert 'SIGTERM: saving interrupted.pth' in log(tmp_path)
        inside += torch.load(tmp_path / 'interrupted.pth', weights_only=True)['meta']['batches_done'] is not None
    assert inside  # others may have waited for the end of a validation
    assert_same_end(finish(tmp_path, SETTINGS), undisturbed)
    assert not (tmp_path / 'interrupted.pth').exists()


UNLIKE_OTHERS = f"""
_base_ = [{str(CONFIG)!r}]
train_dataloader = dict(sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=18, val_interval=4)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4, filename_tmpl='it_{{:02d}}.pth'))
log_processor = dict(by_epoch=False)
custom_imports = dict(imports=['helpers.wrapping'])
custom_hooks = [dict(type='WrapBlockHook', priority='VERY_HIGH'), dict(type='ForkHook'), *_base_.custom_hooks]
"""


def test_other_trainings_resume_at_any_iteration(tmp_path):
    """By iterations, as segmentors are trained: an endless sampler, whose batches are not loaded again.

    Under torch's checkpoint_wrapper, where parameters have other names than in the state dict; with files of other
    names; with processes that are forked for a metric, whose SIGTERM is not the training's.
    """
    config = tmp_path / 'unlike.py'
    config.write_text(UNLIKE_OTHERS)
    options = {'randomness.seed': 2}
    undisturbed = finish(tmp_path / 'one', options, config=config)
    assert 'backbone.stages.0.0.strip_mixing.fuse.weight' in undisturbed['state_dict']
    assert {file.name for file in (tmp_path / 'one').glob('it_*.pth')} == {'it_16.pth', 'it_18.pth'}
    assert f'forked process: {-signal.SIGTERM}' in log(tmp_path / 'one')
    stopped = tmp_path / 'two'
    for number, stop in enumerate((signal.SIGTERM, signal.SIGKILL)):
        process = start(stopped, options, config=config)
        wait_until(lambda goal=6 + 8 * number: log(stopped).count('Iter(train)') >= goal, process)
        os.kill(process.pid, stop)
        process.join(60)
        assert process.exitcode == (SIGTERM_EXIT_CODE if stop == signal.SIGTERM else -stop)
    assert_same_end(finish(stopped, options, config=config), undisturbed)
    assert 'slower' not in log(stopped)


def test_checkpoints_between_the_ends_of_epochs(tmp_path):
    """As mmdet's users save long epochs; the last checkpoint is from before its validation."""
    options = {
        'randomness.seed': 4,
        'default_hooks.checkpoint': dict(by_epoch=False, interval=2, max_keep_ckpts=-1),
    }
    undisturbed = finish(tmp_path / 'whole', options)
    for iteration in (4, 6):
        (tmp_path / str(iteration)).mkdir()
        shutil.copy(tmp_path / 'whole' / f'iter_{iteration}.pth', tmp_path / str(iteration))
        assert_same_end(finish(tmp_path / str(iteration), options), undisturbed)
        assert steps(tmp_path / str(iteration)) == 12 - iteration
    finish(tmp_path / 'whole', options)
    assert steps(tmp_path / 'whole') == 12


EARLY_STOPPING = f"""
_base_ = [{str(CONFIG)!r}]
custom_hooks = [
    dict(type='EMAHook', momentum=0.1),
    dict(type='EarlyStoppingHook', monitor='accuracy/top1', rule='greater', min_delta=1000, patience=2),
]
"""


def test_early_stopping_counts_on(tmp_path):
    config = tmp_path / 'early.py'
    config.write_text(EARLY_STOPPING)
    for _ in range(2):
        finish(tmp_path, {'train_cfg.max_epochs': 8}, config=config)
        assert steps(tmp_path) == 3 * 3


def test_full_disk_and_damaged_checkpoints(tmp_path, undisturbed):
    process = start_and_train(tmp_path, SETTINGS, 8)
    process.kill()
    process.join()
    before = {file.name: file.read_bytes() for file in tmp_path.glob('*.pth')}
    # The system refuses files above 64 KiB, as a full disk would.
    output = fail(tmp_path, SETTINGS, file_limit=2**16)
    name = re.search(
        r'OSError: .*cannot write .*/(epoch_\d+.pth): File too large; existing files are intact', output
    ).group(1)
    assert name not in before
    assert {file.name: file.read_bytes() for file in tmp_path.glob('*.pth')} == before
    assert not unfinished(tmp_path)

    newest = Path((tmp_path / 'last_checkpoint').read_text())
    newest.write_bytes(newest.read_bytes()[:-5000])
    (tmp_path / 'iter_9.pth').write_text('no checkpoint')
    last = finish(tmp_path, SETTINGS)
    for damaged in (newest, tmp_path / 'iter_9.pth'):
        assert f'trying an older one: {damaged} cannot be loaded' in log(tmp_path)
    assert_same_end(last, undisturbed)
