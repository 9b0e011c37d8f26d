import random
import sys
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# Timings vary between machines; examples are fixed, so that a failure comes back.
hypothesis.settings.register_profile('tests', deadline=None, derandomize=True)
hypothesis.settings.load_profile('tests')


@pytest.fixture(autouse=True)
def fixed_seed():
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)
