"""Which errors are told as the death of a process that loads data."""

import pytest
import torch

from mmstrip.engine.loops import explained_worker_death


@pytest.mark.parametrize('kind', [RuntimeError, NotImplementedError, torch.OutOfMemoryError, ValueError])
def test_other_errors_stay_as_they_are(kind):
    with pytest.raises(kind, match='^something else$') as caught, explained_worker_death(2):
        raise kind('something else')
    assert caught.type is kind


@pytest.mark.parametrize(
    'error', [RuntimeError('DataLoader worker (pid 7) is killed by signal'), EOFError(), ConnectionResetError()]
)
def test_a_killed_worker_is_explained(error):
    words = 'a process that loads data was killed .*lower train_dataloader.num_workers'
    with pytest.raises(RuntimeError, match=words), explained_worker_death(2):
        raise error
    with pytest.raises(type(error)), explained_worker_death(0):  # as of a file that ends too early
        raise error
