"""One sentence instead of a traceback for errors that the user of a tool can mend."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.runner import BaseLoop
from torch.distributed import DistNetworkError

from .config import name_of

_BUILDERS = {'build_from_cfg', 'build_scheduler_from_cfg'}  # of mmengine
_PROJECT = {'mmstrip', 'benchmarks', '__main__'}  # the last is the tool
_LIBRARIES = {'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'torch', 'gradio', 'PIL'}


@contextmanager
def short_errors() -> Iterator[None]:
    """Print an error that the user can mend without its traceback and exit with status 1, see :func:`sentence_of`."""
    try:
        yield
    except Exception as error:  # of any kind: all but those of the user are raised again
        sentence = sentence_of(error)
        if not sentence:
            raise
        sys.exit('\n'.join(map(printable, f'Error: {sentence}'.split('\n'))))


def printable(text: str) -> str:
    """Escape what a terminal cannot print or would interpret."""
    return ''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def sentence_of(error: Exception) -> str:
    """What an error says if the user can mend it; '' for an error of the program, which needs its traceback.

    The user can mend what the operating system or this project refuses, at any time. Before a loop runs, also what
    PyTorch and the toolboxes refuse, and parts of theirs that the config gives arguments they cannot compute with.
    """
    text = ' '.join(map(str, error.args)) if isinstance(error, KeyError) else str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package = frames[-1].f_globals.get('__name__', '').partition('.')[0]
    line = traceback.extract_tb(error.__traceback__)[-1].line or ''
    in_worker = re.search(r'DataLoader worker.*\n +File "(.+)", line \d+.*\n +(.+)\n', text, re.DOTALL)  # the last line
    if in_worker:
        file, line = in_worker.groups()
        package = 'mmstrip' if file.startswith(sys.modules['mmstrip'].__path__[0]) else ''
        text = text.strip().rpartition('\n')[2].partition(': ')[2]
    refused = line.startswith('raise ') or isinstance(error, AssertionError)
    # By the operating system, about files: connections break when another process fails.
    files = isinstance(error, OSError) and (error.errno or in_worker) and not isinstance(error, ConnectionError)
    if files or (refused and package in _PROJECT):
        return text
    if any(frame.f_code.co_name == 'run' and isinstance(frame.f_locals.get('self'), BaseLoop) for frame in frames):
        return ''
    if isinstance(error, (ImportError, DistNetworkError)):
        return text
    if package not in _LIBRARIES:
        return ''
    builds = [frame for frame in frames if frame.f_code.co_name in _BUILDERS]
    if refused or frames[-1:] == builds[-1:]:  # the type is not registered, or has no such argument
        return text
    return f'{name_of(builds[-1].f_locals["cfg"]["type"])} cannot be built: {text}' if builds else ''
