"""Errors of validation and testing that name the file at fault."""

from functools import partial

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from ...registry import HOOKS
from ...utils.samples import read_sample


@HOOKS.register_module()
class NamedFilesHook(Hook):
    """Before validation and testing, let their datasets read samples by :func:`mmstrip.utils.samples.read_sample`.

    In training :class:`mmstrip.engine.sampler.SeededSampler` does it.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        _read_named(runner.val_dataloader.dataset)

    def before_test_epoch(self, runner: Runner) -> None:
        _read_named(runner.test_dataloader.dataset)


def _read_named(dataset: Dataset) -> None:
    # DataLoader's own way to fetch a whole batch, in the worker.
    dataset.__getitems__ = partial(_read_samples, dataset)


def _read_samples(dataset: Dataset, indices: list) -> list:
    return [read_sample(dataset, index) for index in indices]
