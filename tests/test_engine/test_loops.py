"""Which errors are told as the death of a process that loads data."""

import pytest
import torch

from mmstrip.engine.loops import explained_worker_death


@pytest.mark.parametrize(
    'error',
    [
        *(kind('something else') for kind in (RuntimeError, NotImplementedError, torch.OutOfMemoryError, ValueError)),
        RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nstack expects equal sizes'),
        EOFError('Caught EOFError in DataLoader worker process 0.'),
    ],
    ids=str,
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, explained_worker_death(2):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'),
        RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'),
        EOFError(),
        ConnectionResetError('Connection reset by peer'),
    ],
    ids=str,
)
def test_a_killed_worker_is_explained(error):
    words = 'a process that loads data was killed .*lower train_dataloader.num_workers'
    with pytest.raises(RuntimeError, match=words), explained_worker_death(2):
        raise error
    with pytest.raises(type(error)), explained_worker_death(0):  # as of a file that ends too early
        raise error
