"""Files written atomically."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .locks import lock

_SUFFIX = '.mmstrip.tmp'


def write_file(path: str | Path, write: Callable) -> None:
    """Write a file atomically: to a temporary file beside it, flushed to the disk, then renamed.

    Args:
        path: The file; an older one stays as it is until the new one is complete.
        write: Called with the open binary file.

    Raises:
        OSError: It cannot be written, because the disk is full for instance; the older file is still there.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        start = f'.{path.name[:40]}.'  # names end at 255 bytes
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=start, suffix=_SUFFIX, delete=False) as file:
            temporary = file.name
            lock(file)  # see remove_unfinished
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = _write_error(error)
        if reason is None:
            raise
        raise OSError(
            reason.errno, f'cannot write {path}: {reason.strerror or reason}; nothing else is lost'
        ) from error


def _write_error(error: BaseException) -> OSError | None:
    """The error of the file system behind an error; torch.save reports its own, at closing its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _flush_folder(folder: Path) -> None:
    """Make the renaming itself last, where the system has that."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what :func:`write_file` left in a folder when its process was killed; living processes lock theirs."""
    for path in Path(folder).glob(f'.*{_SUFFIX}'):
        with suppress(OSError), path.open('r+b') as file:
            if lock(file) is not False:
                path.unlink()
