"""Part *trained*: Strip-MLP-T* and ResNet-50 alike on Caltech-101 at 224 px, in some twenty minutes of an H100.

The paper's recipe with a third of its epochs. Each training resumes where the last call had to end.
"""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from mmstrip.engine.hooks.checkpoint import STOPPED

from ..evidence.run import Run
from ..results import write_json
from .steps import NotRunError, Setting, Steps

EPOCHS, WARMUP, INTERVAL = 100, 7, 10
TOP1 = {'top-1': ('accuracy/top1', 100), 'top-5': ('accuracy/top5', 100)}
_OPTIONS = {
    'train_cfg.max_epochs': EPOCHS,
    'train_cfg.val_interval': INTERVAL,
    'param_scheduler.0.end': WARMUP,
    'param_scheduler.1.begin': WARMUP,
    'train_dataloader.num_workers': 14,
    'default_hooks.checkpoint.interval': 5,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
    'default_hooks.logger.interval': 50,
}
RUNS = {
    name: Run('trained', name, config, TOP1, _OPTIONS, image=(3, 224, 224), amp='bfloat16')
    for name, config in {
        'strip-mlp-tiny-light': 'strip_mlp/strip-mlp-tiny-light_1xb128_caltech101.py',
        'resnet50': 'comparison/resnet50_1xb128_caltech101.py',
    }.items()
}
_TINY = {
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 1,
    'param_scheduler': None,
    'train_dataloader.batch_size': 8,
    'train_dataloader.num_workers': 1,
    'train_dataloader.dataset.indices': 16,
    'val_dataloader.num_workers': 1,
    'val_dataloader.dataset.indices': 8,
    'test_dataloader.num_workers': 1,
    'test_dataloader.dataset.indices': 8,
}


def steps(setting: Setting) -> Steps:
    return {name: partial(train, run_of(name, setting)) for name in RUNS}


def run_of(name: str, setting: Setting) -> Run:
    """The training, or its smallest part, in float32, as CPUs are slow in lower precision."""
    run = RUNS[name]
    return replace(run, options={**run.options, **_TINY}, amp=None) if setting.tiny else run


def train(run: Run, setting: Setting) -> dict:
    """Begin or resume a training; SIGTERM lets it save before it ends.

    Raises:
        NotRunError: There are no images.
        RuntimeError: The training has failed.
    """
    if setting.data_root is None:
        raise NotRunError('it trains on images: name the folder that holds caltech101/ with --data-root')
    folder = Path(setting.out) / 'trainings' / run.name
    result = folder / 'result.json'
    if not result.is_file():
        described = dict(run=asdict(run), data_root=str(Path(setting.data_root).absolute()), checkpoint=None)
        write_json(folder / 'run.json', described)
        _execute(folder)
    return json.loads(result.read_text())


def _execute(folder: Path) -> None:
    with (folder / 'log.txt').open('a') as log:
        command = [sys.executable, '-m', 'benchmarks.evidence.run', str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    # This process gets the signal too, and must be there until the training has saved.
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGTERM, before)
    if code == STOPPED:
        raise NotRunError('it was stopped and has saved; the same command resumes it')
    if code:
        lines = (folder / 'log.txt').read_text().strip().splitlines()
        raise RuntimeError(f'the training ended with {code}: {lines[-1][-400:]}')
