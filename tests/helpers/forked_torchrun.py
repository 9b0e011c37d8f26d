"""tools/torchrun.py whose ranks are forks of its process, as each would import PyTorch and the toolboxes again."""

import atexit
import os
import runpy
import sys
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from helpers import ROOT
from helpers.runs import Forked


def run_rank(script: str, *arguments: str, env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name='__main__')
    finally:
        atexit._run_exitfuncs()


def start_rank(args: tuple[str, ...], env: dict[str, str], **options) -> Forked:
    """In place of subprocess.Popen; ``args``: python -u SCRIPT and its arguments."""
    return Forked(partial(run_rank, *args[2:], env=env))


if __name__ == '__main__':
    subprocess_handler.Popen = start_rank
    runpy.run_path(str(ROOT / 'tools' / 'torchrun.py'), run_name='__main__')
