"""Makes the training of any config resumable: replaces parts of mmengine with ours."""

from pathlib import Path

import torch
from mmengine.config import Config

from ..utils.config import name_of, setting

_HOOKS = tuple(f'mmstrip.{name}Hook' for name in ('Seed', 'InvalidLoss', 'ETA', 'CheckpointFit', 'PlainCheckpoint'))
_BAD_IMAGES_HOOK = 'mmstrip.BadImagesHook'
# In configs that older versions dumped.
_FORMER_HOOKS = ('mmstrip.NamedFilesHook', 'mmstrip.CompleteCheckpointHook', 'mmstrip.TimeLeftHook')


def make_resumable(config: Config) -> None:
    """Insert the samplers, loops and hooks that make a training resumable and let data errors name the file.

    Args:
        config: Complete config with ``work_dir``, possibly dumped by a run, which has passed through here before. Its
            key ``skip_bad_images`` is the largest fraction of training images that may be skipped because they cannot
            be read; without it, the first such image stops the run.

    Raises:
        ValueError: ``skip_bad_images`` is not a number from 0 to 1, or ``custom_hooks`` not a list of dicts.
    """
    hooks = [dict(type=name) for name in _HOOKS]
    share = config.get('skip_bad_images')
    bad_images = None
    if share is not None:
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f'skip_bad_images must be a fraction from 0 to 1, but got {share!r}')
        bad_images = str(Path(config.work_dir).absolute() / 'bad_images.txt')
        hooks.append(dict(type=_BAD_IMAGES_HOOK, path=bad_images, max_share=share))
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = config.get(name)
        if not loader:
            continue
        if config.get('default_scope') == 'mmpretrain':  # one copy per batch, as in its own tool
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if loader.get('pin_memory') and not torch.cuda.is_available():
            loader.pin_memory = False  # PyTorch would warn
        if loader.get('num_workers'):
            loader.setdefault('worker_init_fn', dict(type='mmstrip.block_sigterm_in_worker'))
    sampler = setting(config, 'train_dataloader.sampler')
    if sampler:
        sampler = sampler.sampler if sampler.type == 'mmstrip.SeededSampler' else sampler
        config.train_dataloader.sampler = dict(type='mmstrip.SeededSampler', sampler=sampler, bad_images=bad_images)
    ours = (*_HOOKS, *_FORMER_HOOKS, _BAD_IMAGES_HOOK)
    custom_hooks = config.get('custom_hooks') or []
    if not isinstance(custom_hooks, (list, tuple)) or not all(isinstance(hook, dict) for hook in custom_hooks):
        raise ValueError(f'custom_hooks must be a list of dicts, but got {custom_hooks!r}')
    config.custom_hooks = [hook for hook in custom_hooks if hook.get('type') not in ours] + hooks
    if config.get('train_cfg'):
        _replace_loop(config.train_cfg)
        _merge_groups(config.get('optim_wrapper') or {})
    default_hooks = dict(config.get('default_hooks') or {})
    checkpoint = default_hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint and name_of(checkpoint.get('type', '')) == 'CheckpointHook':
        checkpoint['type'] = 'mmstrip.SafeCheckpointHook'
    info = default_hooks.setdefault('runtime_info', dict(type='RuntimeInfoHook'))
    if info and name_of(info.get('type', '')) == 'RuntimeInfoHook':
        info['type'] = 'mmstrip.LateLossesHook'
    config.default_hooks = default_hooks


def _merge_groups(optim_wrapper: dict) -> None:
    """Merge parameters with equal settings into one group, if the config leaves the groups to mmengine."""
    default = 'DefaultOptimWrapperConstructor'
    if 'optimizer' in optim_wrapper and name_of(optim_wrapper.get('constructor', default)) == default:
        optim_wrapper['constructor'] = 'mmstrip.GroupedOptimWrapperConstructor'


def _replace_loop(loop: dict) -> None:
    kind = name_of(loop['type']) if loop.get('type') else None
    if kind is None and 'by_epoch' not in loop:
        return  # mmengine reports what is missing
    by_epoch = loop.pop('by_epoch', kind == 'EpochBasedTrainLoop')
    if kind in (None, 'EpochBasedTrainLoop', 'IterBasedTrainLoop'):
        loop['type'] = 'mmstrip.ResumableEpochLoop' if by_epoch else 'mmstrip.ResumableIterLoop'
