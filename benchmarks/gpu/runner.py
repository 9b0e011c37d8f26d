"""The steps of the report, each in a process of its own that may fail, hang or die; one file keeps what they find.

As a module it is that process: its arguments are the name of a step, the setting as JSON and a file for the result.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .. import ROOT
from ..machine import describe
from ..results import write_json
from . import Setting, iterations, right, speed
from .iterations import NETWORKS, STRIP

DONE, FAILED = 'done', 'failed'
SECONDS, NOTICE = 90, 10  # of a step, and those that a process gets to end
_PEERS = [name for name in NETWORKS if name != STRIP]
# In the order of their worth.
STEPS: dict[str, Callable[[Setting], dict]] = {
    'right': right.precisions,
    'right-accelerated': partial(right.precisions, names=['bfloat16'], accelerated=True),
    f'iteration-{STRIP}': partial(iterations.measure, STRIP, 'accelerated'),
    **{f'iteration-{name}-compiled': partial(iterations.measure, name, 'compiled') for name in _PEERS},
    **{f'iteration-{name}-eager': partial(iterations.measure, name, 'eager') for name in NETWORKS},
    **{f'inference-128-{name}': partial(speed.inference, name=name, batch=128) for name in NETWORKS},
    **{f'inference-1-{name}': partial(speed.inference, name=name, batch=1) for name in NETWORKS},
    **{f'dense-{name}': partial(speed.dense, name=name) for name in NETWORKS},
    'limits': speed.limits,
    'memory': speed.memory,
    **{
        f'right-accelerated-{one}': partial(right.precisions, names=[one], accelerated=True)
        for one in ('float32', 'deploy')
    },
    'right-forms': right.forms,
    'cards': iterations.cards,
    f'iteration-{STRIP}-compiled': partial(iterations.measure, STRIP, 'compiled'),
    'cards-sync-bn': partial(iterations.cards, options={'model.backbone.norm_cfg.type': 'SyncBN'}),
    'resume-after-kill': right.resume_after_kill,
    **{f'right-{arch}': partial(right.precisions, arch=arch) for arch in ('tiny', 'small', 'base')},
}


def run_steps(names: Sequence[str], setting: Setting, minutes: float, seconds: float = SECONDS) -> dict:
    """Run those of :data:`STEPS` that have no result for some minutes, each for some seconds at most.

    Returns:
        The report, also written after each step: 'environment', 'device', 'tiny', and 'steps' by name, each with its
        'state', 'seconds' and 'result', or 'why' it has failed.
    """
    file, end = Path(setting.out).absolute() / 'report.json', time.monotonic() + 60 * minutes
    steps = json.loads(file.read_text())['steps'] if file.is_file() else {}
    report = dict(environment=describe(setting.device), device=setting.device, tiny=setting.tiny, steps=steps)
    left = [name for name in names if steps.get(name, {}).get('state') != DONE]
    while left and (remaining := end - time.monotonic()) > 0:
        found = _run(left[0], setting, file.parent, min(seconds, remaining))
        if found['state'] == DONE or time.monotonic() < end:  # else it comes first the next time
            steps[left[0]] = found
            write_json(file, report)
            print(f'{left[0]}: {found["state"]}, {found.get("why") or found["seconds"]}', flush=True)
            del left[0]
    if left:
        print(f'No minutes left; the same command goes on with {", ".join(left)}', flush=True)
    return report


def _run(name: str, setting: Setting, out: Path, seconds: float) -> dict:
    """A step in a process of its own."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    result, log = out / 'step.json', out / f'{name}.log'
    result.unlink(missing_ok=True)
    # cuBLAS is deterministic with such a workspace alone.
    env = {'CUBLAS_WORKSPACE_CONFIG': ':4096:8', **os.environ}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    with log.open('w') as file:
        command = [sys.executable, '-m', __name__, name, json.dumps(asdict(setting)), str(result)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        process.wait(seconds)
        why = f'its process ended with {process.returncode}: {log.read_text()[-300:].strip()}'
    except subprocess.TimeoutExpired:
        why = f'it took more than {seconds:.0f} seconds'
    finally:
        _end(process)
    found = json.loads(result.read_text()) if result.is_file() else dict(state=FAILED, why=why)
    return dict(found, seconds=round(time.monotonic() - began, 1))


def _end(process: subprocess.Popen) -> None:
    """End a process and those that it has started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(NOTICE)


def work(name: str, setting: Setting, file: Path, steps: dict = STEPS) -> None:
    """Run a step in this process, and leave what it finds."""
    try:
        found = dict(state=DONE, result=steps[name](setting))
    except Exception as error:  # whatever a device or a toolbox may do
        traceback.print_exc()
        found = dict(state=FAILED, why=f'{type(error).__name__}: {str(error).strip()[:600]}')
    write_json(file, found)


if __name__ == '__main__':
    work(sys.argv[1], Setting(**json.loads(sys.argv[2])), Path(sys.argv[3]))
