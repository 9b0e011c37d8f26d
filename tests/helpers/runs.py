"""Trainings and tools in processes of their own that share the imports of a fork server.

Such a process starts from modules that were imported and nothing else: registries, default scopes, loggers, signal
handlers, environment and working directory are as in a process that a user starts, which takes 5 to 10 seconds more.
"""

import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from mmengine.logging import MMLogger
from torch.distributed.elastic.utils.distributed import get_free_port

from helpers import DATA, ROOT

CONFIG = DATA / 'digits_tiny.py'
_ENVIRONMENT = dict(os.environ)  # before any test
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(
    [
        *(
            'helpers.runs',
            'mmstrip.engine',
            'mmstrip.datasets.digits',
            'benchmarks.transfer',
            'benchmarks.evidence.queue',
            'mmstrip.converters.reparameterize',
        ),
        *(f'{toolbox}.{part}' for toolbox in ('mmpretrain', 'mmdet', 'mmseg') for part in ('models', 'datasets')),
    ]
)


def _begin(target: Callable, *arguments) -> multiprocessing.Process:
    # As on a machine without GPUs, everywhere, and without what a test before set.
    with mock.patch.dict(os.environ, _ENVIRONMENT | dict(CUDA_VISIBLE_DEVICES=''), clear=True):
        multiprocessing.forkserver.ensure_running()
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _print_to(output: str) -> None:
    """Let this process print to the end of a file."""
    with Path(output).open('ab') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)


def _prepare(output: str) -> None:
    """One core, and a file to print to."""
    gc.freeze()  # what was imported: datasets collect garbage, and would look through all of it
    _print_to(output)
    torch.set_num_threads(1)


def _join(process: multiprocessing.Process, seconds: int) -> None:
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f'a process has not ended after {seconds} seconds')


def _run_tool(tool: str, arguments: list[str], output: str, cwd: str, env: dict[str, str]) -> None:
    _prepare(output)
    os.chdir(cwd)
    os.environ.update(env)
    tempfile.tempdir = None  # that of the fork server, whatever the environment says
    sys.argv = [tool, *arguments]
    if tool.startswith('benchmarks.'):
        runpy.run_module(tool, run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, str(Path(tool).parent))
        runpy.run_path(tool, run_name='__main__')


def start_tool(tool: str | Path, *arguments, output: Path, cwd: Path = ROOT, env: dict = {}) -> multiprocessing.Process:
    """Begin to run a script, of tools/ or at another place, or a module of benchmarks/, with its command line.

    What it prints goes to a file.
    """
    script = tool if str(tool).startswith('benchmarks.') else str(ROOT / 'tools' / tool)
    return _begin(_run_tool, script, list(map(str, arguments)), str(output), str(cwd), env)


def call_tool(tool: str | Path, *arguments, folder: Path, **options) -> subprocess.CompletedProcess:
    """Run a script below tools/, or a module of benchmarks/, with its command line, without paying for its imports.

    Args:
        tool: The script, or the name of the module.
        *arguments: Its command line.
        folder: Where a file for its output may be.
        **options: As of :func:`start_tool`.
    """
    output = folder / f'{Path(tool).stem}-{os.urandom(4).hex()}.txt'
    process = start_tool(tool, *arguments, output=output, **options)
    _join(process, 600)
    return subprocess.CompletedProcess([tool, *arguments], process.exitcode, output.read_text())


def run_here(tool: str, *arguments) -> None:
    """Run a script below tools/ in this process, as on a machine without GPUs; an error of it is raised."""
    script = str(ROOT / 'tools' / tool)
    without_gpus = mock.patch('torch.cuda.is_available', lambda: False)
    arguments = mock.patch('sys.argv', [script, *map(str, arguments)])
    with arguments, mock.patch.dict(os.environ), without_gpus:
        runpy.run_path(script, run_name='__main__')


def call_ranks(script: str | Path, *arguments, folder: Path, count: int = 2) -> str:
    """Run a script in several processes, with the environment that torchrun gives them.

    Returns:
        What they printed; all of them must have ended well.
    """
    output, port = folder / 'ranks.txt', str(get_free_port())
    processes = []
    for rank in map(str, range(count)):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        processes.append(start_tool(str(script), *arguments, output=output, env=env))
    for process in processes:
        _join(process, 300)
    assert not any(process.exitcode for process in processes), output.read_text()[-3000:]
    return output.read_text()


def train(config: str, work_dir: str, options: dict, output: str, file_limit: int | None) -> None:
    """What tools/train.py CONFIG --resume does, in a child process that writes to ``output``."""
    from mmstrip.engine import launch
    from mmstrip.utils.config import load_config

    _prepare(output)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    config = load_config(config, options)
    config.work_dir, config.resume = work_dir, True
    launch.train(config)


_SHORT = {
    'train_cfg.max_epochs': 1,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'default_hooks.checkpoint': dict(type='CheckpointHook', interval=1),
    'custom_hooks': [],
    'randomness.seed': 1,
}


def train_here(work_dir: Path, options: dict = {}, resume='auto', validate=False):
    """Train an epoch in this process; the runner and what it warned of. For settings that need no processes."""
    from mmstrip.engine import launch
    from mmstrip.utils.config import load_config

    config = load_config(str(CONFIG), {**_SHORT, **options})
    config.work_dir, config.resume = str(work_dir), resume
    # Two runs of one second would share their logger and message hub, which are named by it.
    config.experiment_name = os.urandom(8).hex()
    if not validate:
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    create = MMLogger.__init__

    def create_and_listen(self, *args, **kwargs) -> None:
        create(self, *args, **kwargs)
        self.addHandler(handler)

    with mock.patch.object(MMLogger, '__init__', create_and_listen):
        runner = launch.train(config)
    return runner, '\n'.join(warnings)


def _execute(folder: str, output: str) -> None:
    from benchmarks.evidence.run import execute_described

    _prepare(output)
    execute_described(Path(folder))


class ForkedRun:
    """A run of the evidence's queue in another process, with the interface of one of subprocess."""

    def __init__(self, folder: Path, log: Path):
        self.process = _begin(_execute, str(folder), str(log))
        self.terminate = self.process.terminate

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> None:
        _join(self.process, 300)


def start(
    work_dir: Path, options: dict, config: Path = CONFIG, file_limit: int | None = None
) -> multiprocessing.Process:
    """Begin or resume a training in another process, which may write no file of more than so many bytes."""
    work_dir.mkdir(exist_ok=True)
    return _begin(train, str(config), str(work_dir), options, str(work_dir / 'output.txt'), file_limit)


def fail(work_dir: Path, options: dict, **settings) -> str:
    """The last lines of a training that ends with an error."""
    process = start(work_dir, options, **settings)
    _join(process, 300)
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
    _join(process, 300)
    assert process.exitcode == 0, log(work_dir)[-3000:]
    return torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=True)
