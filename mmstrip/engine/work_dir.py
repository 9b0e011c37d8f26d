"""One training per work dir."""

import logging
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


def lock_work_dir(folder: str | Path) -> None:
    """Keep other trainings out of a folder as long as this process lives, or until :func:`unlock_work_dirs`.

    Args:
        folder: It is made if it is not there. Its file ``.mmstrip.lock`` names the process; it stays, and the lock on
            it counts.

    Raises:
        RuntimeError: Another process trains there.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and any(os.path.samestat(os.fstat(file.fileno()), path.stat()) for file in _held):
        return  # closing a second one would end the lock
    # A link in its place is not followed, as the file is emptied.
    file = os.fdopen(
        os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666), 'r+', errors='replace'
    )
    locked = lock(file)
    if locked is False:
        holder = file.read(200).strip() or 'another process'
        file.close()
        raise RuntimeError(
            f'{folder} is the work dir of a training that is still running ({holder}): wait for its end, or take '
            f'another --work-dir; if its machine is gone for good, remove {path}'
        )
    if locked is None:
        words = f'{folder} is on a disk without locks: make sure that no other training uses it'
        print_log(words, 'current', logging.WARNING)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    _held.append(file)


def unlock_work_dirs() -> None:
    """Let other processes train in the folders that this one holds."""
    while _held:
        _held.pop().close()
