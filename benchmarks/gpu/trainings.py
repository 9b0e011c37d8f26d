"""Trainings by the tools themselves, on random images, in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from mmengine.runner import Runner
from torch.distributed.elastic.utils.distributed import get_free_port

from mmstrip.engine.launch import build_runner
from mmstrip.engine.precision import set_train_amp
from mmstrip.utils.config import load_config

from .. import CONFIGS, ROOT
from .checks import SMALL_ARCH
from .steps import NotRunError, Setting

TOOLS = ROOT / 'tools'
_SECONDS = 280  # of a training at most
_CONFIG = """\
_base_ = ['{base}']

custom_imports = dict(imports=['benchmarks.gpu.noise'])
model = dict(backbone=dict(arch={arch}, img_size={side}), head=dict(in_channels={channels}))
images = dict(_delete_=True, type='mmstrip.NoiseImages', length={length}, side={side})
train_dataloader = dict(batch_size={batch}, num_workers={workers}, dataset=images)
val_cfg = val_dataloader = val_evaluator = test_cfg = test_dataloader = test_evaluator = None
train_cfg = dict(max_epochs={epochs})
param_scheduler = None
custom_hooks = []
default_hooks = dict(logger=dict(interval=2), checkpoint=dict(save_best=None, max_keep_ckpts=2))
randomness = dict(seed=0, deterministic={deterministic})
{cudnn}
"""


def write_config(
    setting: Setting, name: str, iterations: int, epochs: int = 1, cards: int = 1, deterministic: bool = False
) -> Path:
    """A config of Strip-MLP-T's training on random images, 128 a card; its folder has the name.

    Raises:
        NotRunError: mmpretrain is not installed.
    """
    if find_spec('mmpretrain') is None:
        raise NotRunError('classifiers are trained by mmpretrain, which is not installed')
    folder = Path(setting.out) / 'trainings' / name
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
    folder.mkdir(parents=True)
    batch = 8 if setting.tiny else 128
    text = _CONFIG.format(
        base=CONFIGS / 'strip_mlp' / 'strip-mlp-tiny_8xb128_in1k.py',
        arch=dict(SMALL_ARCH, _delete_=True) if setting.tiny else repr('tiny'),
        channels=8 * SMALL_ARCH['embed_dims'] if setting.tiny else 640,
        side=32 if setting.tiny else 224,
        batch=batch,
        length=batch * iterations * cards,
        workers=1 if setting.tiny else min(8, (os.cpu_count() or 1) // cards or 1),
        epochs=epochs,
        deterministic=deterministic,
        cudnn='env_cfg = dict(cudnn_benchmark=False)' if deterministic else '',
    )
    (folder / 'config.py').write_text(text)
    return folder / 'config.py'


def build(config_file: Path, amp: str | None = None) -> Runner:
    """Its Runner in this process."""
    config = load_config(str(config_file))
    config.work_dir = str(config_file.parent / 'work')
    set_train_amp(config, amp)
    return build_runner(config)


def start(config_file: Path, work_dir: Path, *arguments: str) -> subprocess.Popen:
    """Begin or resume the training, by tools/train.py."""
    command = [sys.executable, TOOLS / 'train.py', config_file, '--work-dir', work_dir, '--resume', *arguments]
    return _start(command, work_dir)


def _start(command: list, work_dir: Path, **environment: str) -> subprocess.Popen:
    work_dir.mkdir(parents=True, exist_ok=True)
    # cuBLAS is deterministic with such a workspace alone.
    own = dict(CUBLAS_WORKSPACE_CONFIG=':4096:8', OMP_NUM_THREADS='1', PYTHON=sys.executable, PORT=str(get_free_port()))
    own['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))  # random images
    with (work_dir / 'log.txt').open('a') as log:
        return subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **own, **environment}
        )


def finish(process: subprocess.Popen, work_dir: Path) -> None:
    """Wait for a training.

    Raises:
        RuntimeError: It has failed, with the end of its log, or takes too long.
    """
    try:
        code = process.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        code = f'no end after {_SECONDS} seconds'
    if code:
        lines = (work_dir / 'log.txt').read_text().strip().splitlines()
        errors = [line for line in lines if re.search(r'\w*Error: ', line)] or lines
        raise RuntimeError(f'the training ended with {code}: {errors[-1][-400:]}')


def train(config_file: Path, work_dir: Path, *arguments: str) -> dict:
    """Train to the end; the last checkpoint."""
    finish(start(config_file, work_dir, *arguments), work_dir)
    return torch.load((work_dir / 'last_checkpoint').read_text(), map_location='cpu', weights_only=True)


def wait_for(file: Path, process: subprocess.Popen) -> None:
    """Until a file is there, or the process has ended."""
    end = time.monotonic() + _SECONDS
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if not file.exists():
        process.kill()
        raise RuntimeError(f'{file} was not written before the training ended with {process.poll()}')


def distributed(config_file: Path, cards: int, name: str, *arguments: str) -> dict:
    """Train by tools/dist_train.sh in so many processes.

    Returns:
        'command', 'images_per_second' of all together, 'step_ms', 'memory_mib' of the first card at its peak, and the
        'backend' that the processes exchange by.
    """
    work_dir = config_file.parent / name
    command = ['bash', TOOLS / 'dist_train.sh', config_file, cards, '--work-dir', work_dir, '--no-validate', *arguments]
    finish(_start(command, work_dir), work_dir)
    batch = load_config(str(config_file)).train_dataloader.batch_size
    return dict(
        command=' '.join(['tools/dist_train.sh', *map(str, command[2:])]),
        cards=cards,
        **_measured(work_dir, batch * cards),
    )


def _measured(work_dir: Path, batch: int) -> dict:
    """From what the run has logged, the first half of it left out."""
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [line for line in lines if 'time' in line and 'loss' in line]
    seconds = median(line['time'] for line in steps[len(steps) // 2 :])
    log = (work_dir / 'log.txt').read_text()
    return dict(
        images_per_second=round(batch / seconds, 1),
        step_ms=round(1e3 * seconds, 2),
        data_ms=round(1e3 * median(line['data_time'] for line in steps[len(steps) // 2 :]), 2),
        memory_mib=max((line.get('memory', 0) for line in steps), default=0),
        loss=steps[-1]['loss'],
        backend='gloo' if 'use the gloo backend' in log else 'nccl',
    )


def module_on_cards(module: str, cards: int, folder: Path, *arguments: str) -> None:
    """Run a module in so many processes, by torchrun."""
    command = [sys.executable, TOOLS / 'torchrun.py', f'--nproc_per_node={cards}', f'--master_port={get_free_port()}']
    finish(_start([*command, '-m', module, *arguments], folder), folder)
