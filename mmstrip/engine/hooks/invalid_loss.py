"""A stop at a loss that is not finite, before broken weights are saved."""

import math
from collections.abc import Iterator

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Stop when a loss is NaN or infinite.

    Raises:
        FloatingPointError: With the losses, the iteration, the learning rate and the files of the batch.
    """

    # Before the hooks that log and save.
    priority = 'VERY_HIGH'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        losses = {name: torch.as_tensor(value).item() for name, value in (outputs or {}).items()}
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if not bad:
            return
        found = ', '.join(f'{name} is {value}' for name, value in bad.items())
        rates = ', '.join(f'{rate:.3g}' for rate in sorted(set(_learning_rates(runner))))
        files = ', '.join(_image_files(data_batch)) or 'unknown'
        raise FloatingPointError(
            f'{found} at iteration {runner.iter + 1} (epoch {runner.epoch + 1}), learning rate {rates}; images of the '
            f'batch: {files}. The checkpoints in {runner.work_dir} are from before it'
        )


def _learning_rates(runner: Runner) -> Iterator[float]:
    for rates in runner.optim_wrapper.get_lr().values():
        yield from rates


def _image_files(batch) -> Iterator[str]:
    """Image files of a batch of data samples, of any toolbox."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    for sample in samples or []:
        yield str(sample.get('img_path', 'unknown'))
