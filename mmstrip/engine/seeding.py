"""Random states that depend on a run's seed and on a place in its training alone."""

import random

import numpy as np
import torch


def seed_all(key: tuple[int, ...], cuda: bool = False) -> None:
    """Set the random states of Python, NumPy and PyTorch to ones that depend on all numbers of ``key``.

    Args:
        key: Non-negative ints.
        cuda: Those of the GPUs as well; not in workers of a DataLoader. Defaults to False.
    """
    first, second, third = (int(state) for state in np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    if cuda and torch.cuda.is_available():
        torch.cuda.manual_seed_all(third)
