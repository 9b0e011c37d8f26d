"""Hooks for distributed tests, loaded by custom_imports."""

import atexit
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

# A process that comes late after a restart must not be looked for where it was before.
if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0' and os.environ['RANK'] == '1':
    time.sleep(2)


@HOOKS.register_module(force=True)
class RankDumpHook(Hook):
    """Each rank writes its weights after training, and a file ``groupN`` if it has not left its group when it ends."""

    def __init__(self, folder: str):
        self.folder = folder

    def after_train(self, runner) -> None:
        torch.save(runner.model.module.state_dict(), f'{self.folder}/rank{get_rank()}.pth')
        mark = Path(self.folder, f'group{get_rank()}')
        atexit.register(lambda: torch.distributed.is_initialized() and mark.touch())


@HOOKS.register_module(force=True)
class DieHook(Hook):
    """Rank 1 fails at an iteration: by a signal, as if the system had killed it, or with an error.

    Args:
        iteration: Place in the training.
        once: File that marks that it has happened; None to raise an error each time instead.
    """

    def __init__(self, iteration: int, once: str | None = None):
        self.iteration = iteration
        self.once = once and Path(once)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if get_rank() != 1 or runner.iter != self.iteration:
            return
        if self.once is None:
            raise OSError('the network card melted')
        if not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
