"""Training in processes that can be killed, without paying for the imports each time."""

import multiprocessing
import os
from pathlib import Path

import torch

from helpers import DATA

CONFIG = DATA / 'digits_tiny.py'
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['helpers.runs', 'mmpretrain.models', 'mmpretrain.datasets', 'mmstrip.engine'])


def train(work_dir: str, options: dict, output: str) -> None:
    """What tools/train.py CONFIG --resume auto does, in a child process that writes to ``output``."""
    from mmstrip.utils.launch import build_runner, load_config

    with Path(output).open('a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    config = load_config(str(CONFIG), options)
    config.work_dir, config.resume, config.load_from = work_dir, True, None
    build_runner(config).train()


def start(work_dir: Path, **options) -> multiprocessing.Process:
    """Begin or go on with a training in another process."""
    work_dir.mkdir(exist_ok=True)
    process = _CONTEXT.Process(target=train, args=(str(work_dir), options, str(work_dir / 'output.txt')))
    process.start()
    return process


def log(work_dir: Path) -> str:
    """What all runs in a work dir have printed."""
    file = work_dir / 'output.txt'
    return file.read_text() if file.exists() else ''


def finish(work_dir: Path, **options) -> dict:
    """Train to the end; the last checkpoint."""
    process = start(work_dir, **options)
    process.join(300)
    assert process.exitcode == 0, log(work_dir)[-3000:]
    return torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=True)
