"""Parts of the report on a GPU, cut in steps: each leaves a JSON file, runs in a process that may die, and runs once.

A step that fails or takes too long is noted with its error and the others go on. One that has a result is not run
again, those without are tried by the next call.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import torch

from ..machine import describe
from ..results import write_json

# Part -> module of its steps, each with ``steps(setting)``.
PARTS = {part: f'{__package__}.{part}' for part in ('right', 'fast', 'many', 'trained')}
DONE, FAILED, NOT_RUN, RUNNING = 'done', 'failed', 'not run', 'running'
NOTICE = 45  # seconds that a process gets to end and to save
_STICKY = ('CUDA error', 'CUBLAS_STATUS', 'CUDNN_STATUS', 'device-side assert')  # after them a process has no GPU


def takes_the_gpu(words: str) -> bool:
    """Whether an error leaves a process without its GPU."""
    return any(sign in words for sign in _STICKY)


class NotRunError(Exception):
    """A step that cannot run on this machine, and why."""


@dataclass(frozen=True)
class Setting:
    """What all steps share.

    Attributes:
        out: Folder of the results, ``{part}/{step}.json``.
        device: 'cuda' or 'cpu'.
        tiny: The smallest networks and images, to see that the steps run; their figures mean nothing.
        minutes: Of each part in one call.
        step_seconds: A step that takes longer is stopped and noted as failed; trainings of part 'trained' may not.
        data_root: Folder that stands for ``data/`` of the configs; None: nothing is trained on images.
    """

    out: str
    device: str = 'cuda'
    tiny: bool = False
    minutes: float = 7
    step_seconds: float = 300
    data_root: str | None = None

    @property
    def cuda(self) -> bool:
        return self.device.startswith('cuda')

    def file(self, part: str, step: str) -> Path:
        return Path(self.out) / part / f'{step}.json'

    def read(self, part: str, step: str) -> dict | None:
        """What a step has left; None where it has not run."""
        file = self.file(part, step)
        return json.loads(file.read_text()) if file.is_file() else None


Steps = dict[str, Callable[[Setting], dict]]


def steps_of(part: str, setting: Setting) -> Steps:
    """The steps of a part, the most important first: name -> function of the setting that gives a dict for JSON."""
    return import_module(PARTS.get(part, part)).steps(setting)


def run_part(part: str, setting: Setting, chosen: Sequence[str] = ('*',)) -> None:
    """Run the steps of a part that have no result, in a process of their own, for as long as the setting allows.

    Args:
        part: One of :data:`PARTS`, or a module like those.
        setting: What all steps share.
        chosen: Patterns of the names of steps. Defaults to all.
    """
    end = time.monotonic() + 60 * setting.minutes
    names = [name for name in steps_of(part, setting) if any(fnmatch(name, pattern) for pattern in chosen)]
    left = [name for name in names if (setting.read(part, name) or {}).get('state') != DONE]
    for name in left:
        setting.file(part, name).unlink(missing_ok=True)
    while left and time.monotonic() < end:
        _watch(part, setting, left, end)
        left = [name for name in left if (setting.read(part, name) or {}).get('state', RUNNING) == RUNNING]
    if left:
        print(f'[{part}] no minutes left; the same command resumes with {", ".join(left)}', flush=True)


def _watch(part: str, setting: Setting, names: Sequence[str], end: float) -> None:
    """One process that works through steps, until it ends or must be ended."""
    folder = Path(setting.out) / part
    folder.mkdir(parents=True, exist_ok=True)
    job = json.dumps(dict(part=part, names=list(names), setting=asdict(setting)))
    with (folder / 'log.txt').open('a') as log:
        command = [sys.executable, '-m', f'{__package__}.worker', job]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(0.05)
            name, began = _running(part, setting, names)
            if time.monotonic() > end:
                _end(process)
                if name and (setting.read(part, name) or {}).get('state') == RUNNING:
                    setting.file(part, name).unlink()  # it comes first the next time
                return
            if name and part != 'trained' and time.time() - began > setting.step_seconds:
                _end(process)
                _note(part, name, setting, FAILED, error=f'it took more than {setting.step_seconds:g} seconds')
                return
    finally:
        _end(process)
    name, _ = _running(part, setting, names)
    if name:
        _note(part, name, setting, FAILED, error=f'its process ended with {process.returncode}: {_tail(folder)}')
    elif process.returncode not in (0, 1):
        raise RuntimeError(f'the process of part {part} ended with {process.returncode}: {_tail(folder)}')


def _running(part: str, setting: Setting, names: Sequence[str]) -> tuple[str | None, float]:
    for name in names:
        found = setting.read(part, name)
        if found and found['state'] == RUNNING:
            return name, found['began']
    return None, 0.0


def _tail(folder: Path) -> str:
    return ' | '.join((folder / 'log.txt').read_text().strip().splitlines()[-3:])[-600:]


def _end(process: subprocess.Popen) -> None:
    """End a process and those that it has started, which may save before."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(NOTICE)
        except subprocess.TimeoutExpired:
            continue


def _note(part: str, name: str, setting: Setting, state: str, **content) -> None:
    write_json(setting.file(part, name), dict(state=state, tiny=setting.tiny, **content))
    if state != RUNNING:
        words = content.get('error') or content.get('reason') or f'{content["seconds"]:.1f} s'
        print(f'[{part}] {name}: {state}, {words}', flush=True)


def work(part: str, names: Sequence[str], setting: Setting) -> bool:
    """Run steps in this process, and leave their files.

    Returns:
        Whether the process is still good for more; False after an error that takes the GPU from it.
    """
    found = describe(setting.device)
    steps = steps_of(part, setting)
    for name in names:
        began = time.time()
        _note(part, name, setting, RUNNING, began=began, environment=found)
        try:
            result = steps[name](setting)
        except NotRunError as reason:
            _note(part, name, setting, NOT_RUN, reason=str(reason), environment=found)
        except Exception as error:  # whatever a device or a toolbox may do
            traceback.print_exc()
            words = f'{type(error).__name__}: {str(error).strip()[:600]}'
            _note(part, name, setting, FAILED, error=words, environment=found, seconds=time.time() - began)
            if takes_the_gpu(words):
                return False
        else:
            seconds = time.time() - began
            _note(part, name, setting, DONE, result=result, environment=found, seconds=round(seconds, 1))
        _forget(setting)
    return True


def _forget(setting: Setting) -> None:
    """Let go of models, which graphs and compilers hold in cycles."""
    torch._dynamo.reset()
    gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()


def results(setting: Setting) -> Iterator[tuple[str, str, dict]]:
    """Part, step and what it has left, of all steps in their order."""
    for part in PARTS:
        for name in steps_of(part, setting):
            yield part, name, setting.read(part, name) or dict(state=NOT_RUN, reason='not yet')
