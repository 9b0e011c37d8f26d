import gc
import os
import random
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import hypothesis
import numpy
import pytest
import torch
import torch.distributed
from mmengine.runner import CheckpointLoader

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # helpers; benchmarks

# Timings vary between machines; examples are fixed, so that a failure comes back.
hypothesis.settings.register_profile('tests', deadline=None, derandomize=True)
hypothesis.settings.load_profile('tests')


def pytest_collection_modifyitems(items):
    """The order of files, which stay whole: those of few tests first, as trainings and exports take longest.

    Deployment is last: after its runtimes, NNCF and mmdeploy in one process, a test in another file crashed without a
    message.
    """
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: ('test_deployment' in item.path.parts, counts[item.path]))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='there is no CUDA'))


def pytest_collection_finish():
    gc.freeze()  # what was imported: datasets collect garbage, and would look through all of it


@pytest.fixture(autouse=True, scope='module')
def process_as_it_was():
    """A Runner lets its process load plain weights alone from then on; the next file's tests start without that."""
    with mock.patch.dict(os.environ), mock.patch.object(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy()):
        yield


@pytest.fixture
def one_process():
    """A process group of this process alone, on gloo."""
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fixed_seed():
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)
