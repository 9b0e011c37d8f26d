"""Random states that depend only on the position in the training."""

import re

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ..sampler import seed_all

# Transforms and batch augmentations of mmdet and mmyolo whose state is not in checkpoints.
_STATEFUL = re.compile(r'\b(CachedMosaic|CachedMixUp|BatchSyncRandomResize|DynamicRoIHead|use_cached(?=\W+True))\b')


@HOOKS.register_module()
class SeedHook(Hook):
    """Before each training iteration, seed what the model draws (mixup, drop path, ...) by seed, rank and iteration.

    A resumed run then draws the same numbers as an uninterrupted one, and no random state has to be saved. A warning
    names transforms of mmdet and mmyolo that keep a state of their own.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        config = str([runner.cfg.get('train_dataloader'), runner.cfg.get('model')])
        found = dict.fromkeys(match.group() for match in _STATEFUL.finditer(config))
        if found:
            runner.logger.warning(
                f'{", ".join(found)}: its state is not saved, so a resumed run differs from an uninterrupted one'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed_all((runner.seed, 0, get_rank(), runner.iter), cuda=True)
