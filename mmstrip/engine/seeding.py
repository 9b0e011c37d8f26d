"""Random states that depend only on a run's seed and a position in its training."""

import random

import numpy as np
import torch


def seed_all(key: tuple[int, ...], cuda: bool = False) -> None:
    """Seed Python, NumPy and PyTorch with all numbers of ``key``; with ``cuda``, not in workers, the GPUs too."""
    first, second, third = (int(state) for state in np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    if cuda and torch.cuda.is_available():
        torch.cuda.manual_seed_all(third)
