"""The ETA, by the clock."""

import time
from collections import deque

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS


@HOOKS.register_module()
class TimeLeftHook(Hook):
    """An ETA in the log that counts validations, saves and starts of workers too, not iterations alone.

    From the mean time of an iteration over the latter half of this start or more, all in between included.
    """

    # After mmengine's IterTimerHook, which sets its own estimate, and before the hook that logs.
    priority = 'NORMAL'

    def before_train(self, runner: Runner) -> None:
        self.done = 0
        self.marks: deque[tuple[int, float]] = deque(maxlen=2)  # iterations done in this start, and when

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        now = time.monotonic()
        self.done += 1
        if self.marks:
            done, then = self.marks[0]
            left = runner.max_iters - runner.iter - 1
            runner.message_hub.update_info('eta', (now - then) / (self.done - done) * left)
        if self.done & (self.done - 1) == 0:  # powers of two
            self.marks.append((self.done, now))
