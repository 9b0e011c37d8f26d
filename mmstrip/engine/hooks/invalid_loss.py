"""Stops at a loss that is not finite, before broken weights are saved."""

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.samples import image_files
from ..host_copy import HostCopy, copies_of


class _Step(NamedTuple):
    """The losses of an iteration, and what an error would say about it."""

    names: list[str]
    values: HostCopy
    place: str
    batch: object


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Stop when a loss is NaN or infinite.

    The host never waits for a loss. A loss is checked in the first iteration that finds it copied from the GPU; on CPUs
    that is its own. All are checked before a checkpoint is written and at the end of an epoch.

    Raises:
        FloatingPointError: With the losses, the iteration, the learning rate and the files of the batch.
    """

    # Before the hooks that log and save.
    priority = 'VERY_HIGH'

    def __init__(self):
        self._steps: deque[_Step] = deque()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None, outputs: dict | None = None
    ) -> None:
        if outputs:
            rates = ', '.join(f'{rate:.3g}' for rate in sorted(set(_learning_rates(runner))))
            place = f'at iteration {runner.iter + 1} (epoch {runner.epoch + 1}), learning rate {rates}'
            for names, values in copies_of(outputs):
                self._steps.append(_Step(names, values, place, data_batch))
        while self._steps and self._steps[0].values.arrived():
            self._check(runner, self._steps.popleft())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict | None = None) -> None:
        while self._steps:
            self._check(runner, self._steps.popleft())

    after_train_epoch = after_train = before_save_checkpoint

    def _check(self, runner: Runner, step: _Step) -> None:
        bad = [(name, value) for name, value in zip(step.names, step.values.read()) if not math.isfinite(value)]
        if not bad:
            return
        found = ', '.join(f'{name} is {value}' for name, value in bad)
        files = ', '.join(dict.fromkeys(image_files(step.batch))) or 'unknown'
        raise FloatingPointError(
            f'{found} {step.place}; images of the batch: {files}. The checkpoints in {runner.work_dir} are from before '
            'it'
        )


def _learning_rates(runner: Runner) -> Iterator[float]:
    for rates in runner.optim_wrapper.get_lr().values():
        yield from rates
