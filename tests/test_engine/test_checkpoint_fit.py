"""Checkpoints of another training than the one that is to take them."""

import logging

import pytest
from helpers.runs import CONFIG
from mmengine.logging import MMLogger

from mmstrip.engine.launch import train
from mmstrip.utils.config import load_config

PLAIN = {
    'train_cfg.max_epochs': 1,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_cfg': None,
    'val_dataloader': None,
    'val_evaluator': None,
    'default_hooks.checkpoint': dict(type='CheckpointHook', interval=1),
    'custom_hooks': [],
    'randomness.seed': 1,
}


def run(folder, options: dict = {}, resume='auto'):
    """Train in this process; what it warned of."""
    config = load_config(str(CONFIG), {**PLAIN, **options})
    config.work_dir, config.resume = str(folder), resume
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    created = MMLogger.__init__

    def listening(self, *args, **kwargs):
        created(self, *args, **kwargs)
        self.addHandler(handler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMLogger, '__init__', listening)
        patch.setattr('mmengine.config.Config.pretty_text', property(lambda self: ''))  # takes a second
        train(config)
    return '\n'.join(warnings)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir with the checkpoint of one epoch."""
    folder = tmp_path_factory.mktemp('trained')
    run(folder)
    return folder


def test_the_same_config_is_resumed_without_a_word(trained):
    assert 'config' not in run(trained)
