"""One training per work dir."""

import os
import socket
from pathlib import Path
from typing import IO

from mmengine.logging import print_log

from ..utils.locks import lock

LOCK = '.mmstrip.lock'
_held: list[IO] = []
if hasattr(os, 'register_at_fork'):  # not on Windows
    os.register_at_fork(after_in_child=_held.clear)  # the locks are the parent's


def hold_work_dir(folder: str | Path) -> None:
    """Keep other trainings out of a folder as long as this process lives, or until :func:`release_work_dirs`.

    Args:
        folder: It is made if it is not there. Its file ``.mmstrip.lock`` names the process; it stays, and it is the lock on it
            that counts.

    Raises:
        RuntimeError: Another process trains there.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and any(os.path.samestat(os.fstat(file.fileno()), path.stat()) for file in _held):
        return  # closing a second one would end the lock
    file = open(path, 'a+', opener=_open_itself)
    locked = lock(file)
    if locked is False:
        file.seek(0)
        holder = file.read(200).strip() or 'another process'
        file.close()
        raise RuntimeError(
            f'{folder} is the work dir of a training that is still running ({holder}): wait for its end, or take '
            f'another --work-dir; if its machine is gone for good, remove {path}'
        )
    if locked is None:
        print_log(f'{folder} is on a disk without locks: make sure that no other training uses it', 'current')
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    _held.append(file)


def _open_itself(path: str, flags: int) -> int:
    """Not what a link leads to, which would be emptied."""
    return os.open(path, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)


def release_work_dirs() -> None:
    """Let other processes train in the folders that this one holds."""
    while _held:
        _held.pop().close()
