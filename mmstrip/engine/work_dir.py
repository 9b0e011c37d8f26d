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
    os.register_at_fork(after_in_child=_held.clear)  # the locks belong to the parent


def lock_work_dir(folder: str | Path) -> None:
    """Keep other trainings out of a folder until this process ends or calls :func:`unlock_work_dirs`.

    It is created if missing. Its file ``.mmstrip.lock`` names the process; the file stays, only the lock on it counts.

    Raises:
        RuntimeError: Another process trains in the folder.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and any(os.path.samestat(os.fstat(file.fileno()), path.stat()) for file in _held):
        return  # closing a second file object would release the lock
    # Do not follow a symbolic link, because the file is truncated.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666)
    file = os.fdopen(descriptor, 'r+', errors='replace')
    locked = lock(file)
    if locked is False:
        holder = file.read(200).strip() or 'another process'
        file.close()
        raise RuntimeError(
            f'{folder} is in use by another training ({holder}). Wait until it ends or choose another --work-dir; '
            f'if its machine is gone for good, remove {path}'
        )
    if locked is None:
        message = f'{folder} is on a file system without locks: make sure that no other training uses it'
        print_log(message, 'current', logging.WARNING)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    _held.append(file)


def unlock_work_dirs() -> None:
    """Let other processes train in the folders that this process has locked."""
    while _held:
        _held.pop().close()
