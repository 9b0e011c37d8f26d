"""Choice of the checkpoint that a run resumes from."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from ..utils.checkpoints import read_checkpoint
from ..utils.config import setting

LAST = 'last_checkpoint'
CHECKPOINTS = ('epoch_*.pth', 'iter_*.pth', 'interrupted.pth')
_PARTS = {
    'optimizer': 'no optimizer state',
    'state_dict': 'no state_dict',
    'meta': 'no meta with epoch and iteration',
    'message_hub': 'no message_hub',
}


def choose_checkpoint(config: Config, trusted: bool = False) -> str | None:
    """Find the checkpoint to resume from: ``load_from``, or the newest readable one in the work dir.

    The run takes over its seed. If there is no checkpoint yet, the run starts from ``load_from`` or from scratch.

    Args:
        config: Complete config with ``work_dir`` and ``resume``: True for ``load_from`` if that is set, 'auto' for the
            work dir in any case.
        trusted: See :func:`mmstrip.utils.checkpoints.read_checkpoint`.

    Returns:
        Path of the checkpoint; None if there is none yet.

    Raises:
        FileNotFoundError: ``load_from`` does not exist.
        ValueError: ``load_from`` cannot be read, or no checkpoint in the work dir can.
    """
    if config.get('load_from') and config.resume != 'auto':
        found = config.load_from, read_resumable(config.load_from, trusted)
    else:
        template = setting(config, 'default_hooks.checkpoint.filename_tmpl') or CHECKPOINTS[0]
        own = re.sub(r'\{.*?\}', '*', template)
        found = _newest(Path(config.work_dir), trusted, (*CHECKPOINTS, own))
    if found is None:
        start = config.get('load_from') or 'scratch'
        print_log(f'No checkpoint in {config.work_dir} yet: training starts from {start}', logger='current')
        return None
    path, checkpoint = found
    print_log(f'Resuming from {path}', logger='current')
    seed = checkpoint['meta'].get('seed')
    if seed is not None:
        randomness = config.get('randomness') or {}
        if randomness.get('seed') not in (None, seed):
            words = f'randomness.seed={randomness["seed"]} is ignored: a resumed run keeps its seed, {seed}'
            print_log(words, 'current', logging.WARNING)
        config.randomness = dict(randomness, seed=seed)
    return path


def _newest(folder: Path, trusted: bool, names: Sequence[str]) -> tuple[str, dict] | None:
    """The newest readable checkpoint in a work dir and its content; None if there is none.

    The file named in ``last_checkpoint`` comes first, then the others, newest first. Unreadable files are logged.
    """
    last, problems = _last_checkpoint(folder), []
    for path in _by_age(folder, last, names):
        try:
            return str(path), read_resumable(path, trusted)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            print_log(f'Cannot resume from this checkpoint, trying an older one: {error}', 'current', logging.WARNING)
    if problems:
        raise ValueError(f'no checkpoint in {folder} can be read: {"; ".join(problems)}')
    if last:
        raise ValueError(
            f'{folder / LAST} names {last[:300]!r}, which does not exist. Remove {LAST} to start from scratch'
        )
    return None


def read_resumable(path: str | Path, trusted: bool = False) -> dict:
    """Read a checkpoint (:func:`mmstrip.utils.checkpoints.read_checkpoint`) that a training can resume from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or lacks what resuming needs.
    """
    checkpoint = read_checkpoint(path, trusted=trusted)
    if problem := _problem(checkpoint):
        raise ValueError(f'{path} cannot be resumed from: {problem}')
    return checkpoint


def _problem(checkpoint) -> str:
    """What a checkpoint lacks for resuming; '' if nothing. Plain weights and files of other libraries lack parts."""
    parts = [checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in _PARTS]
    missing = [words for part, words in zip(parts, _PARTS.values()) if not isinstance(part, dict)]
    if missing:
        return f'it has {missing[0]}'
    _, _, meta, messages = parts
    if not all(isinstance(meta.get(key), int) for key in ('iter', 'epoch')):
        return 'its meta lacks the epoch or iteration'
    lists = ('log_scalars', 'runtime_info', 'resumed_keys')
    return '' if set(lists) <= set(messages) else f'its message_hub must have {", ".join(lists)}'


def _last_checkpoint(folder: Path) -> str:
    """The file named in ``last_checkpoint``; '' if there is none."""
    pointer = folder / LAST
    if not os.path.isfile(pointer):
        return ''
    with pointer.open('rb') as file:
        return os.fsdecode(file.read(5000)).strip()


def _by_age(folder: Path, last: str, names: Sequence[str]) -> list[Path]:
    """Training checkpoints of a work dir: the one in ``last_checkpoint``, then the others, newest first."""
    named = Path(last) if last and os.path.isfile(last) else folder / 'none'
    if os.path.isfile(named) and not os.path.isfile(folder / named.name):
        folder = named.parent  # checkpoints outside the work dir
    files = {file for name in names for file in folder.glob(name)}
    if os.path.isfile(named):
        files.add(folder / named.name)  # whose name may match no pattern
    return sorted(files, key=lambda file: (file.name == named.name, file.lstat().st_mtime_ns), reverse=True)
