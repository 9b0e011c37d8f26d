"""Which checkpoint a run resumes from."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from ..utils.checkpoints import read_checkpoint

LAST = 'last_checkpoint'
CHECKPOINTS = ('epoch_*.pth', 'iter_*.pth', 'interrupted.pth')
_PARTS = {
    'optimizer': 'no state of an optimizer',
    'state_dict': 'no state_dict',
    'meta': 'no meta with its epoch and iteration',
    'message_hub': 'no message_hub',
}


def choose_checkpoint(config: Config, trusted: bool = False) -> str | None:
    """Find the checkpoint of a run to be resumed: ``load_from``, or the newest one in the work dir that can be read.

    The run takes the seed in it; where there is no checkpoint yet, it starts from ``load_from``, or from scratch.

    Args:
        config: A whole config with ``work_dir`` and ``resume``: True for ``load_from`` if that is set, 'auto' for the
            work dir in any case.
        trusted: As of :func:`mmstrip.utils.checkpoints.read_checkpoint`.

    Returns:
        The checkpoint; None where there is none yet.

    Raises:
        FileNotFoundError, ValueError: The checkpoint, or every one in the work dir, cannot be read.
    """
    if config.get('load_from') and config.resume != 'auto':
        found = config.load_from, read_resumable(config.load_from, trusted)
    else:
        hook = (config.get('default_hooks') or {}).get('checkpoint') or {}
        own = re.sub(r'\{.*?\}', '*', hook.get('filename_tmpl') or CHECKPOINTS[0])
        found = _newest(Path(config.work_dir), trusted, (*CHECKPOINTS, own))
    if found is None:
        start = config.get('load_from') or 'scratch'
        print_log(f'No checkpoint in {config.work_dir} yet: the training starts from {start}', logger='current')
        return None
    path, checkpoint = found
    print_log(f'Resuming from {path}', logger='current')
    seed = checkpoint['meta'].get('seed')
    if seed is not None:
        randomness = config.get('randomness') or {}
        if randomness.get('seed') not in (None, seed):
            words = f'randomness.seed={randomness["seed"]} is not applied: a resumed run keeps its seed, {seed}'
            print_log(words, 'current', logging.WARNING)
        config.randomness = dict(randomness, seed=seed)
    return path


def _newest(folder: Path, trusted: bool, names: Sequence[str]) -> tuple[str, dict] | None:
    """The newest checkpoint in a work dir that can be read, and its content; None where there is none.

    The file that ``last_checkpoint`` names comes first, then the others by their time; what cannot be read is logged.
    """
    last, problems = _last_checkpoint(folder), []
    for path in _by_age(folder, last, names):
        try:
            return str(path), read_resumable(path, trusted)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            print_log(f'Cannot resume from this one, going back to the one before: {error}', 'current', logging.WARNING)
    if problems:
        raise ValueError(f'no checkpoint in {folder} can be read: {"; ".join(problems)}')
    if last:
        raise ValueError(f'{folder / LAST} names {last[:300]!r}, which is not there; to start from scratch, remove it')
    return None


def read_resumable(path: str | Path, trusted: bool = False) -> dict:
    """As :func:`mmstrip.utils.checkpoints.read_checkpoint`, of a training that can be resumed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or lacks what resuming needs.
    """
    checkpoint = read_checkpoint(path, trusted=trusted)
    problem = _problem(checkpoint)
    if problem:
        raise ValueError(f'{path} is no checkpoint to resume: {problem}')
    return checkpoint


def _problem(checkpoint) -> str:
    """What a checkpoint lacks, as weights alone do and what others than mmengine have written."""
    parts = [checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in _PARTS]
    missing = [words for part, words in zip(parts, _PARTS.values()) if not isinstance(part, dict)]
    if missing:
        return f'it has {missing[0]}'
    _, _, meta, messages = parts
    if not all(isinstance(meta.get(key), int) for key in ('iter', 'epoch')):
        return 'it does not say at which epoch and iteration it was saved'
    lists = ('log_scalars', 'runtime_info', 'resumed_keys')
    return '' if set(lists) <= set(messages) else f'its message_hub must have {", ".join(lists)}'


def _last_checkpoint(folder: Path) -> str:
    """What ``last_checkpoint`` names; '' where there is none."""
    pointer = folder / LAST
    if not os.path.isfile(pointer):
        return ''
    with pointer.open('rb') as file:
        return os.fsdecode(file.read(5000)).strip()


def _by_age(folder: Path, last: str, names: Sequence[str]) -> list[Path]:
    """Training checkpoints of a work dir, the one of ``last_checkpoint`` first, then the newest first."""
    named = Path(last) if last and os.path.isfile(last) else folder / 'none'
    if os.path.isfile(named) and not os.path.isfile(folder / named.name):
        folder = named.parent  # checkpoints outside of the work dir
    files = {file for name in names for file in folder.glob(name)}
    if os.path.isfile(named):
        files.add(folder / named.name)  # which may be named otherwise
    return sorted(files, key=lambda file: (file.name == named.name, file.lstat().st_mtime_ns), reverse=True)
