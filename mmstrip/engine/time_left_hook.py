"""The time left, by the clock."""

import time

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS


@HOOKS.register_module()
class TimeLeftHook(Hook):
    """Let the log's ``eta`` reckon with validations, saves and starts of workers, not with iterations alone.

    From the mean time an iteration has taken since the second one of this start, all in between included.
    """

    # Behind mmengine's IterTimerHook, which sets its own estimate, and before the hook that logs.
    priority = 'NORMAL'

    def before_train(self, runner: Runner) -> None:
        self.first: tuple[int, float] | None = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        now, done = time.monotonic(), runner.iter + 1
        if self.first is None:  # starts slowly: mmengine's estimate will do
            self.first = done, now
            return
        start, began = self.first
        runner.message_hub.update_info('eta', (now - began) / (done - start) * (runner.max_iters - done))
