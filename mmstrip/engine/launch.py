"""From a config file to a Runner: what the command-line tools share."""

import argparse
import inspect
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ..utils.checkpoints import load_plain_weights_only
from ..utils.config import dataset_class, leaf_datasets
from .resumable import make_resumable
from .resume import choose_checkpoint
from .runner import runner_class
from .work_dir import lock_work_dir, unlock_work_dirs

_RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
LAUNCHERS = ('none', *_RANKS)


def parse_with_launcher(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of a tool that runs in one process or in many."""
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override parts of the config'
    )
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='how the processes were started')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by launchers')
    parser.add_argument(
        '--trust-checkpoints',
        action='store_true',
        help='load checkpoints that run code when they are read; only if you trust their makers',
    )
    parser.add_argument(
        '--no-accelerate',
        action='store_true',
        help='run Strip-MLP as its modules are written, neither by native operators nor compiled',
    )
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def set_work_dir(config: Config, work_dir: str | None, path: str) -> None:
    """Command line before config file before ``./work_dirs/{name of the config}``."""
    config.work_dir = work_dir or config.get('work_dir') or os.path.join('work_dirs', Path(path).stem)


def check_data(config: Config, loaders: Sequence[str]) -> None:
    """Look for the data folders before anything is built.

    Args:
        config: A whole config.
        loaders: Keys of the dataloaders that will be used, such as 'train_dataloader'.

    Raises:
        FileNotFoundError: A ``data_root`` is missing, and its dataset does not download it.
    """
    init_default_scope(config.get('default_scope') or 'mmengine')
    for loader in loaders:
        for key, dataset in leaf_datasets((config.get(loader) or {}).get('dataset'), f'{loader}.dataset'):
            root = dataset.get('data_root')
            if root and '://' not in root and not Path(root).is_dir() and not _downloads(dataset):
                raise FileNotFoundError(
                    f'{key}.data_root: no folder {root}; put the data there, or name its place with '
                    f'--cfg-options {key}.data_root=FOLDER'
                )


def _downloads(dataset: dict) -> bool:
    kind = dataset_class(dataset)
    parameters = inspect.signature(kind).parameters if kind else {}
    return 'download' in parameters and dataset.get('download', True)


def build_runner(
    config: Config, launcher: str = 'none', trust_checkpoints: bool = False, accelerate: bool = True
) -> Runner:
    """The Runner of a config, in a process group if there is a launcher: NCCL with CUDA, else gloo.

    A training can be stopped and resumed anywhere, see :func:`mmstrip.engine.resumable.make_resumable`; from here on,
    the process loads checkpoints without running any code in them.

    Args:
        config: A whole config.
        launcher: 'none', 'pytorch' (torchrun), 'slurm' or 'mpi'.
        trust_checkpoints: Run the code that checkpoints may ask for. Defaults to False.
        accelerate: Run Strip-MLP on its faster implementation (:func:`mmstrip.accelerate`). Defaults to True.

    Raises:
        ValueError: Distributed running without CUDA by a launcher other than torchrun, or a checkpoint to resume that
            cannot be read.
    """
    load_plain_weights_only(trust_checkpoints)
    make_resumable(config)
    set_accelerate(config, accelerate)
    resumed = choose_checkpoint(config, trust_checkpoints) if config.get('resume') else None
    config.launcher = launcher
    if launcher != 'none' and not torch.cuda.is_available():
        _prepare_gloo(config, launcher)
    elif launcher == 'pytorch' and _restarts() and not torch.distributed.is_initialized():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        _join_group('nccl', config)
    runner = runner_class(config.get('runner_type'), config.get('default_scope')).from_cfg(config)
    # Not in the config, which the run has dumped: it is for other runs too.
    runner._resume = resumed is not None
    runner._load_from = resumed or config.get('load_from')
    return runner


def set_accelerate(config: Config, accelerate: bool) -> None:
    """Let a config that has a Strip-MLP run it on its faster implementation, or take out what does.

    The hook is among ``default_hooks``, as lists of ``custom_hooks`` are replaced where they are inherited.
    """
    hooks = dict(config.get('default_hooks') or {})
    options = hooks.pop('accelerate', None) or {}  # without a type where the command line alone has it
    hooks = {key: hook for key, hook in hooks.items() if not _accelerates(hook)}
    if accelerate and _has_strip_mlp(config.get('model')):
        hooks['accelerate'] = dict(options, type='mmstrip.AccelerateHook')
    config.default_hooks = hooks
    config.custom_hooks = [hook for hook in config.get('custom_hooks') or [] if not _accelerates(hook)]


def _accelerates(hook) -> bool:
    return isinstance(hook, dict) and _is_named(hook, 'AccelerateHook')


def _has_strip_mlp(node) -> bool:
    """Whether a model's config names a Strip-MLP."""
    if isinstance(node, dict):
        return _is_named(node, 'StripMLP') or any(map(_has_strip_mlp, node.values()))
    return isinstance(node, (list, tuple)) and any(map(_has_strip_mlp, node))


def _is_named(node: dict, name: str) -> bool:
    """Whether a config is of that type, in any scope."""
    kind = node.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2] == name


def train(config: Config, launcher: str = 'none', trust_checkpoints: bool = False, accelerate: bool = True) -> Runner:
    """Train by a config, in whose work dir no other training may run meanwhile.

    Takes the arguments of :func:`build_runner`.

    Raises:
        RuntimeError: Another training runs in the work dir.
    """
    if launcher == 'none' or int(os.environ.get(_RANKS[launcher], 0)) == 0:  # the process that writes there
        lock_work_dir(config.work_dir)
    try:
        runner = build_runner(config, launcher, trust_checkpoints, accelerate)
        runner.train()
    finally:
        unlock_work_dirs()
    return runner


def _prepare_gloo(config: Config, launcher: str) -> None:
    """mmengine's own start-up selects CUDA devices, so on CPUs the group comes from here."""
    if launcher != 'pytorch':
        raise ValueError(f"launcher must be 'pytorch' (torchrun) on machines without CUDA, but got {launcher!r}")
    if not torch.distributed.is_initialized():
        _join_group('gloo', config)
        print_log('No CUDA: the processes use the gloo backend', logger='current')


def _restarts() -> int:
    """How often torchrun has started the processes again."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def _join_group(backend: str, config: Config) -> None:
    """Join the other processes of this start; torchrun's store still has the addresses of those that died before."""
    store, rank, world_size = next(torch.distributed.rendezvous('env://'))
    store = torch.distributed.PrefixStore(f'start_{_restarts()}', store)
    seconds = ((config.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
    timeout = None if seconds is None else timedelta(seconds=seconds)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave_group() -> None:
    """End the process group after a run that went well; threads that it leaves to the end of Python may abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
