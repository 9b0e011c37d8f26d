"""Worker processes of a DataLoader."""

import os
import signal
import threading

from ..registry import FUNCTIONS


# The second name is in configs that older versions dumped.
@FUNCTIONS.register_module(name=['block_sigterm_in_worker', 'shield_worker'])
def block_sigterm_in_worker(worker_id: int) -> None:
    """Worker init function that ignores SIGTERM unless it comes from the parent process.

    Clusters send the signal to all processes, but the training process must still finish its step and save.
    """
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_parent_sigterm, daemon=True).start()


def _exit_on_parent_sigterm() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
