"""Training in processes that can be killed, without paying for the imports each time."""

import multiprocessing
import os
import resource
from pathlib import Path

import torch

from helpers import DATA

CONFIG = DATA / 'digits_tiny.py'
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['helpers.runs', 'mmpretrain.models', 'mmpretrain.datasets', 'mmstrip.engine'])


def train(config: str, work_dir: str, options: dict, output: str, file_limit: int | None) -> None:
    """What tools/train.py CONFIG --resume does, in a child process that writes to ``output``."""
    from mmstrip.engine.launch import build_runner
    from mmstrip.utils.config import load_config

    with Path(output).open('a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    torch.set_num_threads(1)
    config = load_config(config, options)
    config.work_dir, config.resume = work_dir, True
    build_runner(config).train()


def start(
    work_dir: Path, options: dict, config: Path = CONFIG, file_limit: int | None = None
) -> multiprocessing.Process:
    """Begin or go on with a training in another process, which may write no file of more than so many bytes."""
    work_dir.mkdir(exist_ok=True)
    arguments = (str(config), str(work_dir), options, str(work_dir / 'output.txt'), file_limit)
    process = _CONTEXT.Process(target=train, args=arguments)
    process.start()
    return process


def fail(work_dir: Path, options: dict, **settings) -> str:
    """The last lines of a training that ends with an error."""
    process = start(work_dir, options, **settings)
    process.join(300)
    assert process.exitcode == 1, log(work_dir)[-3000:]
    return log(work_dir)[-3000:]


def children(pid: int) -> list[int]:
    """The processes that a process has started, such as the workers of its dataloaders."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def log(work_dir: Path) -> str:
    """What all runs in a work dir have printed."""
    file = work_dir / 'output.txt'
    return file.read_text() if file.exists() else ''


def finish(work_dir: Path, options: dict, **settings) -> dict:
    """Train to the end; the last checkpoint."""
    process = start(work_dir, options, **settings)
    process.join(300)
    assert process.exitcode == 0, log(work_dir)[-3000:]
    return torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=True)
