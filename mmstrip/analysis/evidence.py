"""The evidence: trainings on public images that test the paper's claims, as `make evidence` works through them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from .runs import Metrics, Run, write_json

TOP1: Metrics = {'top-1': ('accuracy/top1', 100)}
RATES = (5e-4, 1e-3, 2e-3)
RATE = 'optim_wrapper.optimizer.lr'
EPOCHS = 'train_cfg.max_epochs'
STRIP = 'strip-mlp-tiny-light'
# Config of each model on Caltech-101 -> minutes that one core takes for 1,000 training images, about.
CALTECH101 = {
    'strip-mlp-tiny-light': ('strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py', 0.32),
    'resnet50': ('comparison/resnet50_1xb32_caltech101-64px.py', 0.45),
    'resnet18': ('comparison/resnet18_1xb32_caltech101-64px.py', 0.2),
    'convnext-tiny': ('comparison/convnext-tiny_1xb32_caltech101-64px.py', 0.45),
    'swin-tiny': ('comparison/swin-tiny_1xb32_caltech101-64px.py', 0.45),
}
CALTECH101_THOUSANDS = 5.525
CHOOSING_EPOCHS, CALTECH101_EPOCHS = 4, 15
SEEDS = (0, 1, 2)

Results = dict[str, dict]


def caltech101(results: Results) -> list[Run]:
    """Part 1: Strip-MLP-T* against its peers, from scratch.

    The learning rate of each by short runs; seed 0 of all; further seeds of the first two on the held-out images.
    """
    choosing, first, further = [], [], []
    for model, (config, cost) in CALTECH101.items():
        cost *= CALTECH101_THOUSANDS
        short = Run('caltech101', '', config, TOP1, {EPOCHS: CHOOSING_EPOCHS}, core_minutes=cost * CHOOSING_EPOCHS)
        rates = choose_rate(short, model, RATES)
        choosing += rates
        whole = with_rate(replace(short, options={EPOCHS: CALTECH101_EPOCHS}), rates, results)
        whole = replace(whole, core_minutes=cost * CALTECH101_EPOCHS)
        first.append(replace(whole, name=f'{model}_seed0'))
        further += [replace(whole, name=f'{model}_seed{seed}', seed=seed) for seed in SEEDS[1:]]
    best = first_places(first, results, 2)
    if best is None:  # for the estimate of the time: two of a middle cost
        further = [replace(run, waits=True) for run in further if run.name.startswith((STRIP, 'resnet50'))]
    else:
        further = [run for run in further if run.name.rpartition('_')[0] in best]
    return choosing + first + further


def choose_rate(run: Run, name: str, rates: Iterable[float]) -> list[Run]:
    """Runs that choose a learning rate."""
    return [
        replace(run, name=f'choose_{name}_lr{rate:g}', options={**run.options, RATE: rate}, choosing=True)
        for rate in rates
    ]


def with_rate(run: Run, choosing: list[Run], results: Results) -> Run:
    """A run at the learning rate that was best; it waits until all of them have been tried."""
    if not all(run.key in results for run in choosing):
        return replace(run, waits=True)
    best = max(choosing, key=lambda one: results[one.key][next(iter(one.metrics))])
    return replace(run, options={**run.options, RATE: best.options[RATE]})


def first_places(runs: list[Run], results: Results, count: int) -> set[str] | None:
    """The models whose runs are best at their last validation, on held-out images; None while one is missing."""
    if not all(run.key in results for run in runs):
        return None
    metric = next(iter(runs[0].metrics))
    order = sorted(runs, key=lambda run: results[run.key]['curve'][-1][metric], reverse=True)
    return {run.name.rpartition('_')[0] for run in order[:count]}


PARTS: dict[str, Callable[[Results], list[Run]]] = {'caltech101': caltech101}


def declared(parts: Collection[str], results: Results) -> list[Run]:
    """All runs of some parts, in the order in which they are worth most; settings that hang on others' results too.

    Args:
        parts: Names from ``PARTS``.
        results: What :func:`read_results` gives.
    """
    return [run for name, runs in PARTS.items() if name in parts for run in runs(results)]


def read_results(folder: Path) -> Results:
    """Results by ``{part}/{name}``, from the JSON files of a folder."""
    return {str(file.relative_to(folder))[:-5]: json.loads(file.read_text()) for file in folder.glob('*/*.json')}


def is_done(run: Run, results: Results) -> bool:
    """Whether a run has its result, of the same settings."""
    return run.key in results and results[run.key]['settings'] == run.settings


class Queue:
    """Works through runs, each in a process of its own on one core.

    Args:
        runs: Gives the runs for the results that there are.
        results: Folder of the results, ``{part}/{name}.json``; a run that has its own there is not run again.
        work_dir: Folder of logs and checkpoints, ``{part}/{name}/``; a run that was stopped resumes from there.
        data_root: Folder that stands for ``data/`` of the configs.
        jobs: Runs at a time.
    """

    def __init__(
        self, runs: Callable[[Results], list[Run]], results: Path, work_dir: Path, data_root: str, jobs: int = 1
    ):
        self.runs, self.results, self.work_dir, self.data_root, self.jobs = runs, results, work_dir, data_root, jobs
        self.active: dict[str, tuple[Run, subprocess.Popen, float]] = {}
        self.failed: set[str] = set()
        self.spent = self.expected = 0.0  # minutes, of the runs that have ended here

    def work(self, report_every: float = 300.0) -> int:
        """Run all that have no result; the number of those that failed or could not begin.

        Args:
            report_every: Seconds between two lines on what is going on. Defaults to 300.
        """
        reported = time.monotonic()
        try:
            while True:
                left = self._left()
                while len(self.active) < self.jobs and (run := self._next(left)):
                    self._start(run)
                if not self.active:
                    break
                time.sleep(0.5)
                if self._collect() or time.monotonic() - reported > report_every:
                    reported = time.monotonic()
                    print(self._progress(), flush=True)
        finally:
            for _, process, _ in self.active.values():
                process.terminate()
        return len(self._left())

    def _left(self) -> list[Run]:
        results = read_results(self.results)
        return [run for run in self.runs(results) if not is_done(run, results)]

    def _next(self, left: list[Run]) -> Run | None:
        """The first one that can begin; before it, again, the one whose checkpoint it starts from, if that is gone."""
        waiting = self.failed | set(self.active)
        for run in left:
            if run.waits or run.key in waiting:
                continue
            if run.start is None or self._checkpoint(run.start):
                return run
            starters = {other.key: other for other in self.runs(read_results(self.results))}
            starter = starters.get(run.start)
            if starter and not starter.waits and starter.key not in waiting:
                return starter
        return None

    def _checkpoint(self, key: str | None) -> str | None:
        """Last checkpoint of a run that has ended."""
        if key is None or not (self.work_dir / key / 'result.json').is_file():
            return None
        checkpoint = (self.work_dir / key / 'last_checkpoint').read_text()
        return checkpoint if Path(checkpoint).is_file() else None

    def _start(self, run: Run) -> None:
        folder = self.work_dir / run.key
        described = dict(run=asdict(run), data_root=str(self.data_root), checkpoint=self._checkpoint(run.start))
        self._keep_if_same(folder, run)
        write_json(folder / 'run.json', described)
        with (folder / 'log.txt').open('a') as log:
            process = subprocess.Popen(
                [sys.executable, '-m', 'mmstrip.analysis.runs', str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
            )
        self.active[run.key] = run, process, time.monotonic()
        print(f'{run.key} begins, log: {folder / "log.txt"}', flush=True)

    def _keep_if_same(self, folder: Path, run: Run) -> None:
        """Put aside what runs with other settings have left in a work dir, so that it is not resumed."""
        file = folder / 'run.json'
        if file.is_file() and Run(**json.loads(file.read_text())['run']).settings != run.settings:
            folder.rename(folder.with_name(f'{folder.name}.old-{time.time():.0f}'))

    def _collect(self) -> bool:
        """Take over the results of runs that have ended; whether there was one."""
        ended = [key for key, (_, process, _) in self.active.items() if process.poll() is not None]
        for key in ended:
            run, process, began = self.active.pop(key)
            minutes = (time.monotonic() - began) / 60
            file = self.work_dir / key / 'result.json'
            if process.returncode or not file.is_file():
                self.failed.add(key)
                print(f'{key} failed: {_last_line(self.work_dir / key / "log.txt")}', flush=True)
                continue
            self.spent += minutes
            self.expected += run.core_minutes
            result = json.loads(file.read_text())
            write_json(self.results / f'{key}.json', result)
            found = ', '.join(f'{name} {result[name]:.4f}' for name in run.metrics)
            print(f'{key} has ended after {minutes:.1f} minutes: {found}', flush=True)
        return bool(ended)

    def _progress(self) -> str:
        """How far it is, and the time left over all of it, at the pace of the runs that have ended."""
        results = read_results(self.results)
        runs = self.runs(results)
        done = sum(is_done(run, results) for run in runs)
        pace = self.spent / self.expected if self.expected else 1.0
        left = sum(run.core_minutes for run in runs if not is_done(run, results) and run.key not in self.failed) * pace
        for _, _, began in self.active.values():
            left -= (time.monotonic() - began) / 60
        hours = max(left, 0) / 60 / self.jobs
        names = ', '.join(self.active) or 'none'
        failed = f', {len(self.failed)} failed' if self.failed else ''
        return f'{done} of {len(runs)} runs done{failed}; running: {names}; about {hours:.1f} hours left'


def _last_line(file: Path) -> str:
    lines = file.read_text().strip().splitlines()
    return lines[-1] if lines else 'no output'


def print_list(runs: list[Run], results: Results) -> None:
    """One line for each run: its state, its figures or what it will take."""
    for run in runs:
        if is_done(run, results):
            state = ', '.join(f'{name} {results[run.key][name]:.4f}' for name in run.metrics)
        else:
            state = 'waits for others' if run.waits else f'about {run.core_minutes:.0f} minutes'
        print(f'{run.key:50} {state}')
    left = sum(run.core_minutes for run in runs if not is_done(run, results)) / 60
    done = sum(is_done(run, results) for run in runs)
    print(f'{done} of {len(runs)} runs done, about {left:.1f} hours of one core left')

