"""Options of training that need no run to be checked."""

import copy
import logging
import os
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import FUNCTIONS
from mmengine.runner import EpochBasedTrainLoop

from mmstrip.engine.hooks import SeedHook
from mmstrip.engine.resumable import make_resumable
from mmstrip.engine.resume import choose_checkpoint
from mmstrip.engine.workers import block_sigterm_in_worker

STATE = dict(
    state_dict={},
    optimizer={},
    message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
    meta=dict(epoch=1, iter=5),
)


def test_any_config_becomes_resumable():
    """Loops, samplers and hooks of the toolboxes' own configs; what a config chose itself stays."""
    config = Config(
        dict(
            work_dir='work',
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=3),
            train_dataloader=dict(num_workers=2, sampler=dict(type='InfiniteSampler', shuffle=True)),
            val_dataloader=dict(num_workers=2, worker_init_fn=dict(type='mine')),
            default_hooks=dict(checkpoint=dict(type='MyCheckpointHook')),
        )
    )
    make_resumable(config)
    assert config.train_cfg == dict(type='mmstrip.ResumableIterLoop', max_iters=3)
    assert config.train_dataloader.sampler.type == 'mmstrip.SeededSampler'
    assert config.train_dataloader.sampler.sampler == dict(type='InfiniteSampler', shuffle=True)
    assert config.train_dataloader.worker_init_fn == dict(type='mmstrip.block_sigterm_in_worker')
    assert config.val_dataloader.worker_init_fn == dict(type='mine')
    assert config.default_hooks.checkpoint.type == 'MyCheckpointHook'
    assert config.default_hooks.runtime_info.type == 'mmstrip.LateLossesHook'
    names = ['Seed', 'InvalidLoss', 'ETA', 'CheckpointFit', 'PlainCheckpoint']
    assert [hook.type for hook in config.custom_hooks] == [f'mmstrip.{name}Hook' for name in names]
    once = copy.deepcopy(config)
    make_resumable(config)  # a config that a run has dumped
    assert config.to_dict() == once.to_dict()


def test_names_in_configs_that_older_versions_dumped():
    hooks = [dict(type=f'mmstrip.{name}Hook') for name in ('TimeLeft', 'ETA', 'NamedFiles')]
    loader = dict(num_workers=2, worker_init_fn=dict(type='mmstrip.shield_worker'))
    config = Config(dict(work_dir='work', custom_hooks=hooks, train_dataloader=loader))
    make_resumable(config)
    assert [hook.type for hook in config.custom_hooks].count('mmstrip.ETAHook') == 1
    assert not {'mmstrip.TimeLeftHook', 'mmstrip.NamedFilesHook'} & {hook.type for hook in config.custom_hooks}
    assert FUNCTIONS.get(config.train_dataloader.worker_init_fn.type) is block_sigterm_in_worker


EPOCHS = dict(type='mmstrip.ResumableEpochLoop', max_epochs=3)


@pytest.mark.parametrize(
    'loop, after',
    [
        (dict(by_epoch=True, max_epochs=3), EPOCHS),
        (dict(type='EpochBasedTrainLoop', max_epochs=3), EPOCHS),
        (dict(type=EpochBasedTrainLoop, max_epochs=3), EPOCHS),
        (dict(type='mmengine.runner.EpochBasedTrainLoop', max_epochs=3), EPOCHS),
        (dict(type='MyLoop', max_epochs=3), dict(type='MyLoop', max_epochs=3)),
        (dict(max_epochs=3), dict(max_epochs=3)),  # mmengine says what is missing
    ],
    ids=str,
)
def test_types_may_be_names_classes_or_paths(loop, after):
    hooks = dict(checkpoint=dict(type='mmengine.hooks.CheckpointHook'), runtime_info=None)
    config = Config(dict(work_dir='work', train_cfg=loop, default_hooks=hooks))
    make_resumable(config)
    assert config.train_cfg == after and config.default_hooks.checkpoint.type == 'mmstrip.SafeCheckpointHook'
    assert config.default_hooks.runtime_info is None


def test_where_a_run_begins(tmp_path, monkeypatch):
    """``load_from`` is what a training starts from until the work dir has a checkpoint of its own."""
    start, own = tmp_path / 'start.pth', tmp_path / 'work' / 'ep_1.pth'
    own.parent.mkdir()
    state = dict(STATE, meta=dict(epoch=1, iter=5, seed=3))
    torch.save(state, start)
    config = Config(dict(work_dir=str(own.parent), load_from=str(start), resume='auto'))
    unchanged = copy.deepcopy(config)
    assert choose_checkpoint(config) is None and config.to_dict() == unchanged.to_dict()
    torch.save(state, own)
    (own.parent / 'last_checkpoint').write_text(str(own))
    assert choose_checkpoint(config) == str(own) and config.randomness.seed == 3
    assert (config.resume, config.load_from) == ('auto', str(start))  # what the run dumps is for other runs too
    said: list[str] = []
    monkeypatch.setattr('mmstrip.engine.resume.print_log', lambda words, *_, **__: said.append(words))
    config.randomness.seed = 8
    choose_checkpoint(config)
    assert said[-1] == 'randomness.seed=8 is ignored: a resumed run keeps its seed, 3' and config.randomness.seed == 3
    config.resume = True
    assert choose_checkpoint(config) == str(start)
    own.unlink()
    config.resume = 'auto'
    with pytest.raises(ValueError, match=r"last_checkpoint names .*ep_1.pth', which does not exist"):
        choose_checkpoint(config)
    torch.save(dict(state, meta={}), start)
    config.resume = True
    with pytest.raises(ValueError, match='start.pth cannot be resumed from: its meta lacks the epoch'):
        choose_checkpoint(config)


def test_older_checkpoints_of_other_names(tmp_path):
    torch.save(STATE, tmp_path / 'ep_01.pth')
    (tmp_path / 'ep_02.pth').write_bytes(b'damaged')
    hooks = dict(checkpoint=dict(type='CheckpointHook', filename_tmpl='ep_{:02d}.pth'))
    config = Config(dict(work_dir=str(tmp_path), resume=True, default_hooks=hooks))
    assert choose_checkpoint(config) == str(tmp_path / 'ep_01.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'ep_02.pth'))
    assert choose_checkpoint(config) == str(tmp_path / 'ep_01.pth')


def test_names_that_cannot_be_checkpoints_are_passed_over(tmp_path):
    """The newest one that can be read is taken, whatever else is there."""
    config = Config(dict(work_dir=str(tmp_path), resume=True))
    torch.save(STATE, tmp_path / 'epoch_1.pth')
    (tmp_path / 'epoch_2.pth').mkdir()
    (tmp_path / 'epoch_3.pth').symlink_to(tmp_path / 'nowhere')
    os.mkfifo(tmp_path / 'epoch_4.pth')
    torch.save([1], tmp_path / 'epoch_5.pth')
    for pointer in (b'\xff\xfe\n', b'a' * 300, b'/' + b'b/' * 4000, b'epoch\0', b'', bytes(tmp_path / 'epoch_3.pth')):
        (tmp_path / 'last_checkpoint').write_bytes(pointer)
        assert choose_checkpoint(config) == str(tmp_path / 'epoch_1.pth')
    (tmp_path / 'epoch_1.pth').unlink()
    with pytest.raises(ValueError, match='no checkpoint in .* can be read: .*epoch_2.pth'):
        choose_checkpoint(config)


def test_a_damaged_tensor_sends_a_run_back(tmp_path):
    for epoch in (1, 2):
        torch.save(dict(STATE, state_dict=dict(weight=torch.rand(5000))), tmp_path / f'epoch_{epoch}.pth')
    content = bytearray((tmp_path / 'epoch_2.pth').read_bytes())
    content[10_000:14_096] = bytes(4096)
    (tmp_path / 'epoch_2.pth').write_bytes(content)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    assert choose_checkpoint(Config(dict(work_dir=str(tmp_path), resume=True))) == str(tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize(
    'parts, named',
    [
        (dict(train_dataloader=dict(dataset=dict(pipeline=[dict(type='mmdet.CachedMixUp')]))), 'CachedMixUp'),
        (dict(model=dict(batch_augments=[dict(type='BatchSyncRandomResize')])), 'BatchSyncRandomResize'),
        (dict(train_dataloader=dict(pipeline=[dict(type='Mosaic', use_cached=True)])), 'use_cached'),
        (dict(train_dataloader=dict(pipeline=[dict(type='Mosaic')]), model=dict(roi_head='StandardRoIHead')), ''),
    ],
)
def test_transforms_with_a_state_of_their_own_are_named(parts, named, caplog):
    SeedHook().before_train(SimpleNamespace(cfg=Config(parts), logger=logging.getLogger('warned')))
    assert caplog.messages == [
        f'{named}: its state is not saved, so a resumed run differs from an uninterrupted one'
    ] * bool(named)
