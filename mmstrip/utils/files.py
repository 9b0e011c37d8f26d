"""Files written atomically."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .locks import lock

_SUFFIX = '.mmstrip.tmp'


def write_file(path: str | Path, write: Callable) -> None:
    """Write a file atomically: to a temporary file beside it, flushed to disk, then renamed.

    Args:
        path: File to write; an older one stays until the new one is complete.
        write: Called with the open binary file.

    Raises:
        OSError: The file cannot be written, for example on a full disk; the older one is intact.
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
            reason.errno, f'cannot write {path}: {reason.strerror or reason}; existing files are intact'
        ) from error


def _write_error(error: BaseException) -> OSError | None:
    """The OSError behind an error; torch.save reports an error of its own when it closes its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system supports it."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: str | Path) -> None:
    """Remove files that :func:`write_file` left in a folder when killed; running processes lock theirs."""
    for path in Path(folder).glob(f'.*{_SUFFIX}'):
        with suppress(OSError), path.open('r+b') as file:
            if lock(file) is not False:
                path.unlink()
