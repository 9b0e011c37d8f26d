"""tools/torchrun.py whose ranks are forks of its process, as each would import PyTorch and the toolboxes again."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from helpers import ROOT


def run_rank(script: str, *arguments: str, env: dict[str, str]) -> None:
    os.setsid()
    for sign in (signal.SIGINT, signal.SIGTERM):  # torchrun has handlers
        signal.signal(sign, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name='__main__')
    finally:
        atexit._run_exitfuncs()


class Rank:
    """In place of subprocess.Popen; ``args``: python -u SCRIPT and its arguments."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **options):
        context = multiprocessing.get_context('fork')
        self.process = context.Process(target=run_rank, args=args[2:], kwargs=dict(env=env))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired('rank', timeout)


if __name__ == '__main__':
    subprocess_handler.Popen = Rank
    runpy.run_path(str(ROOT / 'tools' / 'torchrun.py'), run_name='__main__')
