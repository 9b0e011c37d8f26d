"""The steps of the report, each in a process of its own, which may fail, hang or crash; one file keeps their rows."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..machine import describe
from ..results import write_json
from . import iterations, right, speed
from .iterations import NETWORKS, STRIP
from .page import attempt

SECONDS = 90  # of a step
CONTEXT = multiprocessing.get_context('spawn')
_PEERS = [name for name in NETWORKS if name != STRIP]
# In order of their worth: name -> function of `dry`, which returns rows.
STEPS: dict[str, Callable[..., list[dict]]] = {
    'right': partial(right.compare, right.PRECISIONS),
    'right-accelerated': partial(right.compare, right.accelerated('bfloat16')),
    f'iteration-{STRIP}': partial(iterations.measure, STRIP, 'accelerated'),
    **{f'iteration-{name}-compiled': partial(iterations.measure, name, 'compiled') for name in _PEERS},
    **{f'iteration-{name}-eager': partial(iterations.measure, name, 'eager') for name in NETWORKS},
    **{f'inference-{batch}-{name}': partial(speed.inference, name, batch) for batch in (128, 1) for name in NETWORKS},
    **{f'dense-{name}': partial(speed.dense, name) for name in NETWORKS},
    'memory': speed.memory,
    **{f'right-accelerated-{one}': partial(right.compare, right.accelerated(one)) for one in ('float32', 'deploy')},
    'right-forms': partial(right.compare, right.FORMS),
    f'iteration-{STRIP}-compiled': partial(iterations.measure, STRIP, 'compiled'),
    **{f'right-{arch}': partial(right.compare, right.PRECISIONS, arch=arch) for arch in ('tiny', 'small', 'base')},
}


def run_steps(names: Sequence[str], out: Path, minutes: float, dry: bool = False, seconds: float = SECONDS) -> dict:
    """Run those of :data:`STEPS` that are not done yet, until the minutes end, each for at most some seconds.

    Returns:
        The report, written to ``report.json`` after each step: 'environment', 'dry', and 'steps', name -> 'seconds'
        and 'rows'. A step is done if no row has an 'error'.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, end = out / 'report.json', time.monotonic() + 60 * minutes
    steps = json.loads(file.read_text())['steps'] if file.is_file() else {}
    report = dict(environment=describe('cpu' if dry else 'cuda'), dry=dry, steps=steps)
    left = [name for name in names if name not in steps or errors_of(steps[name])]
    left.sort(key=lambda name: name in steps)  # what has failed comes last
    while left and (remaining := end - time.monotonic()) > 0:
        step = _run(left[0], dry, out / f'{left[0]}.log', min(seconds, remaining))
        if time.monotonic() < end or not errors_of(step):  # else the minutes cut it short
            steps[left[0]] = step
            write_json(file, report)
            print(f'{left.pop(0)}: {"; ".join(errors_of(step)) or "done"}, {step["seconds"]} s', flush=True)
    if left:
        print(f'No minutes left; the same command continues with {", ".join(left)}', flush=True)
    return report


def errors_of(step: dict) -> list[str]:
    return [row['error'] for row in step['rows'] if 'error' in row]


def _run(name: str, dry: bool, log: Path, seconds: float) -> dict:
    begin = time.monotonic()
    log.write_text('')
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(name, dry, log, send))
    process.start()
    send.close()
    try:
        slow = [dict(error=f'it took more than {seconds:.0f} seconds')]
        rows = receive.recv() if receive.poll(seconds) else slow
    except EOFError:
        process.join()
        rows = [dict(error=f'its process ended with {process.exitcode}: {log.read_text()[-300:].strip()}')]
    finally:
        process.kill()
        process.join()
    return dict(seconds=round(time.monotonic() - begin, 1), rows=rows)


def _work(name: str, dry: bool, log: Path, send) -> None:
    """Run a step in this process, print to a file, and send its rows."""
    with log.open('w') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    found = attempt(lambda: dict(rows=STEPS[name](dry=dry)))
    send.send(found.get('rows') or [found])
