"""The ETA by wall-clock time."""

import time
from collections import deque

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS


@HOOKS.register_module()
class ETAHook(Hook):
    """Log an ETA that includes validations, saving and worker startup, not iterations only.

    It is based on the mean time per iteration over at least the latter half of this run, pauses included.
    """

    # After mmengine's IterTimerHook, which sets its own estimate, and before the logger hook.
    priority = 'NORMAL'

    def before_train(self, runner: Runner) -> None:
        self.done = 0
        self.marks: deque[tuple[int, float]] = deque(maxlen=2)  # iterations done in this run, and when

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None, outputs: dict | None = None
    ) -> None:
        now = time.monotonic()
        self.done += 1
        if self.marks:
            done, then = self.marks[0]
            left = runner.max_iters - runner.iter - 1
            runner.message_hub.update_info('eta', (now - then) / (self.done - done) * left)
        if self.done & (self.done - 1) == 0:  # powers of two
            self.marks.append((self.done, now))
