"""Trainings that are killed and resumed, and how they must end: as if nothing had happened."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path

import torch

from .runs import log, start


def assert_same_end(checkpoint: dict, expected: dict) -> None:
    """Weights, their average, optimizer, schedules and what was validated are the same, bit for bit."""
    for part in ('state_dict', 'ema_state_dict'):
        assert checkpoint[part].keys() == expected[part].keys()
        different = [name for name, value in expected[part].items() if not torch.equal(value, checkpoint[part][name])]
        assert not different
    for index, state in expected['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(value, checkpoint['optimizer']['state'][index][name])
    assert checkpoint['param_schedulers'] == expected['param_schedulers']
    for name in ('train/loss', 'val/accuracy/top1'):
        one, other = (part['message_hub']['log_scalars'][name]['history'] for part in (checkpoint, expected))
        assert torch.equal(one, other), name


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob('.*.tmp'))


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while process.is_alive() and not condition() and time.monotonic() < end:
        time.sleep(0.0005)


def steps(folder: Path) -> int:
    return log(folder).count('Epoch(train)')


def start_and_train(folder: Path, settings: dict, iterations: int) -> Process:
    """A process that resumes the run and has trained so many more iterations."""
    goal = steps(folder) + iterations
    process = start(folder, settings)
    wait_until(lambda: steps(folder) >= goal, process)
    return process


def kill_repeatedly(folder: Path, settings: dict, kills: int) -> int:
    """kill -9 at random moments and, every other time, in the middle of writing a checkpoint.

    Returns:
        How many kills left a checkpoint half written.
    """
    moments, during_save = random.Random(0), 0
    for number in range(kills):
        process = start_and_train(folder, settings, moments.randint(2, 5))
        if number % 2:
            wait_until(lambda: unfinished(folder), process)
        else:
            time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        during_save += bool(unfinished(folder))
    return during_save
