"""File locks that end with the process that holds them."""

from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


def lock(file: IO) -> bool | None:
    """Lock a file that is open for writing for this process, without waiting.

    This is a POSIX record lock, not ``flock``, because it belongs to the process alone: forked processes such as
    DataLoader workers do not inherit it, so it ends with the process even if they live on. It also works between the
    clients of a network disk, and ends when the process closes any descriptor of the file.

    Returns:
        True if this process has the lock now, False if another process has it, None if locks are unavailable.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks, or its lock server does not answer
        return None
    return True
