"""Locks on files, which end with the process that holds them."""

from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


def lock(file: IO) -> bool | None:
    """Lock an open file for this process, without waiting.

    A POSIX record lock and not ``flock``: it belongs to the process alone. Processes forked from it, such as the
    workers of a DataLoader, do not inherit it, so it is gone as soon as the process is, even if they are not; and it
    works between the clients of a network disk. It also ends when the process closes any descriptor of the file.

    Args:
        file: Open for writing.

    Returns:
        True if this process has it now, False if another process has it, None where there are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # of the file system: it has none, or its lock server does not answer
        return None
    return True
