"""From a config to a Runner: shared by the command-line tools."""

import argparse
import inspect
import logging
import multiprocessing
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ..utils.checkpoints import add_trust_option, load_plain_weights_only
from ..utils.config import add_config_options, bare_name, dataset_class, leaf_datasets, setting
from .resumable import make_resumable
from .resume import choose_checkpoint
from .runner import runner_class
from .work_dir import lock_work_dir, unlock_work_dirs

_STARTERS = dict(pytorch='torchrun', slurm='srun', mpi='mpirun')
# Environment variables that a launcher sets, the rank and the number of processes first.
_NUMBERS = dict(
    pytorch=('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'),
    slurm=('SLURM_PROCID', 'SLURM_NTASKS'),
    mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
)
LAUNCHERS = ('none', *_STARTERS)
# Settings that count epochs, iterations or files, with their lowest values; -1 stands for never or for all.
_LOWEST = {
    'train_cfg.val_begin': 0,
    'train_cfg.val_interval': 1,
    'default_hooks.checkpoint.interval': -1,
    'default_hooks.checkpoint.max_keep_ckpts': -1,
    'log_processor.window_size': 0,
}


def parse_with_launcher(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of a tool that runs in one or several processes, with the options that these share."""
    add_config_options(parser)
    parser.add_argument(
        '--launcher', choices=LAUNCHERS, default='none', help='how the processes are started (default: none)'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    add_trust_option(parser)
    parser.add_argument(
        '--no-accelerate',
        action='store_true',
        help='run the reference implementation of Strip-MLP: no native operators, no compilation',
    )
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def set_work_dir(config: Config, work_dir: str | None, path: str) -> None:
    """Set ``work_dir``: the command line's, else the config's, else ``./work_dirs/{name of the config}``."""
    config.work_dir = work_dir or config.get('work_dir') or os.path.join('work_dirs', Path(path).stem)


def check_data(config: Config, loaders: Sequence[str]) -> None:
    """Check that the data folders of the dataloaders with these keys exist before anything is built.

    Raises:
        FileNotFoundError: A ``data_root`` does not exist, and its dataset does not download it.
    """
    init_default_scope(config.get('default_scope') or 'mmengine')
    for loader in loaders:
        for key, dataset in leaf_datasets(config, f'{loader}.dataset'):
            root = dataset.get('data_root')
            if root and '://' not in root and not Path(root).is_dir() and not _downloads(dataset):
                raise FileNotFoundError(
                    f'{key}.data_root: no folder {root}. Put the data there, or set '
                    f'--cfg-options {key}.data_root=FOLDER'
                )


def _downloads(dataset: dict) -> bool:
    kind = dataset_class(dataset)
    parameters = inspect.signature(kind).parameters if kind else {}
    return 'download' in parameters and dataset.get('download', True)


def build_runner(
    config: Config, launcher: str = 'none', trust_checkpoints: bool = False, accelerate: bool = True
) -> Runner:
    """Build the Runner of a config, in a process group if there is a launcher: NCCL with CUDA, gloo otherwise.

    The training can be stopped and resumed anywhere, see :func:`mmstrip.engine.resumable.make_resumable`. From this
    call on, the process loads checkpoints without running code in them.

    Args:
        config: Complete config.
        launcher: 'none', 'pytorch' (torchrun), 'slurm' or 'mpi'. Defaults to 'none'.
        trust_checkpoints: Let checkpoints run code. Defaults to False.
        accelerate: Run Strip-MLP on its faster implementation (:func:`mmstrip.accelerate`). Defaults to True.

    Raises:
        ValueError: The process was not started by the launcher; without CUDA, the launcher is not torchrun; a setting
            has a value that does not exist; or the checkpoint to resume from cannot be read.
    """
    _rank(launcher)
    _check_values(config)
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
    # Set here, because the config is dumped by now and serves other runs too.
    runner._resume = resumed is not None
    runner._load_from = resumed or config.get('load_from')
    return runner


def _check_values(config: Config) -> None:
    """Check settings whose errors would not name them."""
    level, load_from = config.get('log_level', 'INFO'), config.get('load_from')
    is_level = isinstance(level, int) or isinstance(logging.getLevelName(level), int)
    seed = setting(config, 'randomness.seed')
    is_seed = seed is None or (isinstance(seed, int) and 0 <= seed < 2**32)
    start = setting(config, 'env_cfg.mp_cfg.mp_start_method', 'fork')
    methods = multiprocessing.get_all_start_methods()
    for key, value, is_right, allowed in (
        ('log_level', level, is_level, 'DEBUG, INFO, WARNING or ERROR'),
        ('randomness.seed', seed, is_seed, 'an int from 0 to 2**32 - 1, or None'),
        ('env_cfg.mp_cfg.mp_start_method', start, start in methods, f'one of {", ".join(methods)}'),
        ('load_from', load_from, load_from is None or isinstance(load_from, str), 'a path'),
    ):
        if not is_right:
            raise ValueError(f'{key} must be {allowed}, but is {value!r}')
    for key, lowest in _LOWEST.items():
        number = setting(config, key, lowest)
        if not isinstance(number, (int, float)) or number < lowest:
            raise ValueError(f'{key} must be a number of at least {lowest}, but is {number!r}')


def set_accelerate(config: Config, accelerate: bool) -> None:
    """Add the hook that runs Strip-MLP on its faster implementation if the model has one; else remove the hook.

    It goes into ``default_hooks``, because configs that inherit ours replace the list ``custom_hooks``.
    """
    hooks = dict(config.get('default_hooks') or {})
    options = hooks.pop('accelerate', None) or {}  # has no type if only the command line sets it
    hooks = {key: hook for key, hook in hooks.items() if not _accelerates(hook)}
    if accelerate and _has_strip_mlp(config.get('model')):
        hooks['accelerate'] = dict(options, type='mmstrip.AccelerateHook')
    config.default_hooks = hooks
    config.custom_hooks = [hook for hook in config.get('custom_hooks') or [] if not _accelerates(hook)]


def _accelerates(hook) -> bool:
    return isinstance(hook, dict) and bare_name(hook) == 'AccelerateHook'


def _has_strip_mlp(node) -> bool:
    """Whether a model's config names a Strip-MLP."""
    if isinstance(node, dict):
        return bare_name(node) == 'StripMLP' or any(map(_has_strip_mlp, node.values()))
    return isinstance(node, (list, tuple)) and any(map(_has_strip_mlp, node))


def train(config: Config, launcher: str = 'none', trust_checkpoints: bool = False, accelerate: bool = True) -> Runner:
    """Train from a config. No other training may use its work dir meanwhile.

    Takes the arguments of :func:`build_runner`.

    Raises:
        RuntimeError: Another training uses the work dir.
    """
    if _rank(launcher) == 0:  # only rank 0 writes there
        lock_work_dir(config.work_dir)
    try:
        runner = build_runner(config, launcher, trust_checkpoints, accelerate)
        runner.train()
    finally:
        unlock_work_dirs()
    return runner


def _rank(launcher: str) -> int:
    """Rank of this process.

    Raises:
        ValueError: The launcher's environment variables are missing, no numbers, or contradict each other.
    """
    if launcher == 'none' or torch.distributed.is_initialized():
        return get_rank()
    for name in _NUMBERS[launcher]:
        value = os.environ.get(name)
        if not (value or '').isdecimal():
            raise ValueError(
                f'--launcher {launcher} is for processes that {_STARTERS[launcher]} starts: {name} must be a number, '
                f'but is {value or "not set"}'
            )
    rank, world_size = (int(os.environ[name]) for name in _NUMBERS[launcher][:2])
    if rank >= world_size:
        raise ValueError(f'{_NUMBERS[launcher][0]} must be below the number of processes, {world_size}, but is {rank}')
    return rank


def _prepare_gloo(config: Config, launcher: str) -> None:
    """Join a gloo group here, because mmengine's own setup selects CUDA devices."""
    if launcher != 'pytorch':
        raise ValueError(f"launcher must be 'pytorch' (torchrun) on machines without CUDA, but got {launcher!r}")
    if not torch.distributed.is_initialized():
        _join_group('gloo', config)
        print_log('CUDA is not available: using the gloo backend', logger='current')


def _restarts() -> int:
    """How many times torchrun has restarted the processes."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def _join_group(backend: str, config: Config) -> None:
    """Join the process group, under a prefix per restart: torchrun's store keeps the addresses of dead processes."""
    store, rank, world_size = next(torch.distributed.rendezvous('env://'))
    store = torch.distributed.PrefixStore(f'start_{_restarts()}', store)
    seconds = setting(config, 'env_cfg.dist_cfg.timeout')
    timeout = None if seconds is None else timedelta(seconds=seconds)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave_group() -> None:
    """Destroy the process group after a successful run; threads left until Python exits may abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
