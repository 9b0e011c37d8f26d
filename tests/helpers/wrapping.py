"""Hooks for tests, loaded by custom_imports."""

import multiprocessing
import time

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


@HOOKS.register_module(force=True)
class WrapBlockHook(Hook):
    """Put the first block of the backbone under torch's activation checkpointing."""

    def before_run(self, runner) -> None:
        stage = runner.model.backbone.stages[0]
        stage[0] = checkpoint_wrapper(stage[0])


@HOOKS.register_module(force=True)
class ForkHook(Hook):
    """At the end of each epoch stop a forked process; the pool of mmdet's VOCMetric does."""

    def after_train_epoch(self, runner) -> None:
        process = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join(20)
        exit_code = process.exitcode
        process.kill()
        runner.logger.info(f'forked process: {exit_code}')
