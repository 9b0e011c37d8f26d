"""A sampler that seeds each sample, so that a run can be stopped anywhere and resumed exactly.

The random state of a sample (crop, flip, erasing, ...) depends only on the run's seed, the rank and the sample's
position in the training, not on earlier samples or on the worker.
"""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank
from torch.utils.data import Dataset, Sampler

from ..registry import DATA_SAMPLERS
from ..utils.samples import UnreadableImageError, read_sample

_MAX_REPLACEMENTS = 100


def seed_all(key: tuple[int, ...], cuda: bool = False) -> None:
    """Seed Python, NumPy and PyTorch with all numbers of ``key``; with ``cuda``, not in workers, the GPUs too."""
    first, second, third = (int(state) for state in np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    if cuda and torch.cuda.is_available():
        torch.cuda.manual_seed_all(third)


class SeededIndex(int):
    """Index of a sample, with the numbers that seed its random state."""

    key: tuple[int, ...]  # seed of the run, 1 (for samples), rank, position in the training


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Seeds each sample of another sampler, through the dataset's ``__getitems__``.

    Args:
        sampler (dict): Config of the sampler that chooses the indices.
        seed (int, optional): Seed of the run.
        bad_images (str, optional): File that lists unreadable images, one per line; another sample replaces each.
            Defaults to None: the first unreadable image stops the run.
    """

    def __init__(self, dataset: Dataset, sampler: dict, seed: int | None = None, bad_images: str | None = None):
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.dataset = dataset
        self.seed = self.sampler.seed if seed is None else seed
        self.epoch = self.first = 0
        if hasattr(self.sampler, 'skip'):
            self.skip = self._skip
        # DataLoader's workers call this to fetch a batch.
        dataset.__getitems__ = partial(fetch, dataset, bad_images=bad_images)

    def __iter__(self) -> Iterator[SeededIndex]:
        first, self.first = self.first, 0
        places = itertools.count(self.epoch * len(self.sampler) + first)
        for place, index in zip(places, itertools.islice(self.sampler, first, None)):
            index = SeededIndex(index)
            index.key = (self.seed, 1, get_rank(), place)
            yield index

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)

    def _skip(self, num_samples: int) -> None:
        """Skip the first samples of an infinite sampler that has not started."""
        self.first = num_samples


def fetch(dataset: Dataset, indices: list, bad_images: str | None = None) -> list:
    """The samples of a batch, each with its own random state; see :class:`SeededSampler`."""
    return [_fetch_one(dataset, int(index), index.key, bad_images) for index in indices]


def _fetch_one(dataset: Dataset, index: int, key: tuple, bad_images: str | None):
    for attempt in range(_MAX_REPLACEMENTS):
        seed_all((*key, attempt))
        try:
            return read_sample(dataset, index)
        except (FileNotFoundError, UnreadableImageError) as error:
            if bad_images is None:
                raise
            with Path(bad_images).open('a') as file:
                file.write(f'{error}\n')
        index = (index + 1) % len(dataset)
    raise ValueError(f'{_MAX_REPLACEMENTS} images in a row cannot be read; the last lines of {bad_images} name them')
