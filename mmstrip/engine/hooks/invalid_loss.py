"""Hooks that stop a training on bad data, before anything broken is saved."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS


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


@HOOKS.register_module()
class BadImagesHook(Hook):
    """Report images that cannot be read and were skipped, and stop when there are too many.

    Args:
        path (str): File to which :class:`mmstrip.datasets.SeededSampler` writes them.
        max_share (float): Largest share of the training images that may be bad.

    Raises:
        ValueError: More images of the training set are bad.
    """

    def __init__(self, path: str, max_share: float):
        self.path = Path(path)
        self.max_share = max_share
        self.known: set[str] = set()
        self.seen = 0  # bytes of the file, which is read only when it has grown

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        if not self.path.is_file() or self.path.stat().st_size == self.seen:
            return
        text = self.path.read_text()
        self.seen = len(text.encode())
        lines = dict.fromkeys(text.splitlines())
        new = [line for line in lines if line not in self.known]
        self.known.update(new)
        for line in new:
            runner.logger.warning(f'Skipped, {len(self.known)} so far: {line}')
        total = len(runner.train_dataloader.dataset)
        if len(self.known) > self.max_share * total:
            raise ValueError(
                f'{len(self.known)} of {total} training images cannot be read, more than skip_bad_images='
                f'{self.max_share:g} allows; {self.path} names them'
            )
