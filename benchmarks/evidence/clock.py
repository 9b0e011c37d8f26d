"""Cost of a training, and its validation curve."""

import time

from mmengine.hooks import Hook
from mmengine.runner import Runner


class ClockHook(Hook):
    """Measure the time of training iterations, including data loading, without validation and checkpoints.

    ``runner.message_hub.get_info('clock')`` holds 'seconds' (wall time), 'core_seconds' (CPU time of this process,
    independent of other programs), 'images', and 'curve': one dict per validation with 'epoch', 'seconds',
    'core_seconds' and the metrics. It is saved in checkpoints, so a resumed run continues counting; iterations lost in
    an interruption are not counted.
    """

    priority = 'NORMAL'

    def before_train(self, runner: Runner) -> None:
        if 'clock' not in runner.message_hub.runtime_info:
            runner.message_hub.update_info('clock', dict(seconds=0.0, core_seconds=0.0, images=0, curve=[]))
        self.clock = runner.message_hub.get_info('clock')

    def before_train_epoch(self, runner: Runner) -> None:
        self.marks = time.monotonic(), time.process_time()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        marks = time.monotonic(), time.process_time()
        self.clock['seconds'] += marks[0] - self.marks[0]
        self.clock['core_seconds'] += marks[1] - self.marks[1]
        self.clock['images'] += _count_images(data_batch)
        self.marks = marks

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not hasattr(self, 'clock'):
            return  # validation without training
        point = dict(epoch=runner.epoch, seconds=self.clock['seconds'], core_seconds=self.clock['core_seconds'])
        point |= {name: float(value) for name, value in metrics.items()}
        self.clock['curve'] = [p for p in self.clock['curve'] if p['epoch'] < runner.epoch] + [point]


def _count_images(batch) -> int:
    """Images in a batch of any toolbox, in all branches if there are several."""
    inputs = batch['inputs'] if isinstance(batch, dict) else batch[0]
    return sum(map(len, inputs.values())) if isinstance(inputs, dict) else len(inputs)
