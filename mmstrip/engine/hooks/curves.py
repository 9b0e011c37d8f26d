"""A plot of the training curves."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ...registry import HOOKS
from ...utils.plots import plot_curves


def log_folder(runner: Runner) -> Path:
    """The run's log folder, ``{work_dir}/{timestamp}/``, created if missing."""
    folder = Path(runner.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def validation_curve(runner: Runner, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (or iterations) and values of a validation metric, at the end of training.

    A run validates at multiples of ``val_interval`` and at its end. A resumed run may lack the validation after its
    checkpoint, so positions are counted from the end.

    Args:
        runner: The runner that has trained.
        name: Name in the message hub, such as 'val/mIoU'.
    """
    values = np.array(runner.message_hub.get_scalar(name).data[0], dtype=float)
    last = runner.epoch if isinstance(runner.train_loop, EpochBasedTrainLoop) else runner.iter
    interval = runner.train_loop.val_interval
    before = (last - 1) // interval * interval  # the second to last validation
    places = before - interval * np.arange(len(values) - 2, -1, -1)
    return np.append(places, last)[-len(values) :], values


@HOOKS.register_module()
class TrainingCurvesHook(Hook):
    """At the end of training, draw loss, learning rate and validation metrics to ``curves.png`` in the log folder.

    Args:
        metrics (Sequence[str], optional): Validation metrics to draw, such as 'coco/bbox_mAP'. Defaults to all.
    """

    # After the hook that saves the last checkpoint, whose path is logged here.
    priority = 'LOWEST'

    def __init__(self, metrics: Sequence[str] | None = None):
        self.metrics = metrics

    @master_only
    def after_train(self, runner: Runner) -> None:
        if 'train/loss' not in runner.message_hub.log_scalars:
            return  # nothing was trained, as with mmpretrain's tool that draws schedules
        path = log_folder(runner) / 'curves.png'
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        plot_curves(self._panels(runner, by_epoch), 'epoch' if by_epoch else 'iteration', path)
        runner.logger.info(f'Training curves: {path}')
        last = Path(runner.work_dir) / 'last_checkpoint'
        if last.is_file():
            runner.logger.info(f'Checkpoint: {last.read_text()}')

    def _panels(self, runner: Runner, by_epoch: bool) -> dict:
        """Curves over epochs (or iterations) from the message hub, which is resumed too."""
        scale = len(runner.train_dataloader) if by_epoch else 1

        def curve(name):
            values = np.array(runner.message_hub.get_scalar(name).data[0], dtype=float)
            return np.arange(1, len(values) + 1) / scale, values

        scalars = runner.message_hub.log_scalars
        panels = {'loss': {'training': curve('train/loss')}}
        if rates := {label: curve(name) for label, name in _rates(scalars).items()}:
            panels['learning rate'] = rates
        names = [name for name in scalars if name.startswith('val/')]
        drawn = {name.removeprefix('val/'): validation_curve(runner, name) for name in names if 'time' not in name}
        if self.metrics is not None:
            drawn = {name: drawn[name] for name in self.metrics if name in drawn}
        if drawn:
            panels['validation'] = drawn
        return panels


def _rates(scalars: Iterable[str]) -> dict[str, str]:
    """Optimizer ('' if there is one only) -> scalar of its learning rate, such as 'generator.lr' if there are several.

    If parameter groups differ, 'lr' is that of the first one, and 'base_lr' that of the config.
    """
    found = {}
    for name in sorted(scalars, reverse=True):  # so that base_lr comes after lr
        optimizer, _, rate = name.removeprefix('train/').rpartition('.')
        if name.startswith('train/') and rate in ('lr', 'base_lr'):
            found[optimizer] = name
    return found
