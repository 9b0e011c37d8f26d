"""The scheduler of the evidence: runs trainings on several cores and reports progress."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..results import write_json
from .minutes import expected_minutes
from .run import Results, Run, is_done, read_results, settings_of


class Queue:
    """Execute runs, each in its own process.

    Args:
        runs: Returns the runs, given the existing results.
        results: Folder of the results, ``{part}/{name}.json``; a run with a result is skipped.
        work_dir: Folder of logs and checkpoints, ``{part}/{name}/``; interrupted runs resume from there.
        data_root: Folder that replaces ``data/`` of the configs.
        jobs: Cores to use. A run starts when one is free. Defaults to 1.
    """

    def __init__(
        self, runs: Callable[[Results], list[Run]], results: Path, work_dir: Path, data_root: str, jobs: int = 1
    ):
        self.runs, self.results, self.work_dir, self.data_root, self.jobs = runs, results, work_dir, data_root, jobs
        self.active: dict[str, tuple[Run, subprocess.Popen, float]] = {}
        self.failed: set[str] = set()
        self.spent = self.expected = 0.0  # core minutes of finished runs

    def work(self, report_every: float = 300.0) -> int:
        """Execute all runs without a result; return the number of those that failed or could not start.

        Args:
            report_every: Seconds between progress reports. Defaults to 300.
        """
        reported = time.monotonic()
        try:
            while True:
                while sum(one.threads for one, _, _ in self.active.values()) < self.jobs and (run := self._next()):
                    self._start(run)
                if not self.active:
                    break
                time.sleep(0.5)
                if self._collect() or time.monotonic() - reported > report_every:
                    reported = time.monotonic()
                    print(self._progress(), flush=True)
        finally:
            for _, process, _ in self.active.values():
                process.terminate()  # it saves a checkpoint
            for _, process, _ in self.active.values():
                process.wait()
        return len(self._left())

    def _left(self) -> list[Run]:
        results = read_results(self.results)
        left = [run for run in self.runs(results) if not is_done(run, results)]
        ended = [run for run in left if run.key not in self.active and self._adopt_result(run)]
        return self._left() if ended else left

    def _adopt_result(self, run: Run) -> bool:
        """Copy the result of a run that finished without this queue, if there is one; return whether there was."""
        file = self.work_dir / run.key / 'result.json'
        result = json.loads(file.read_text()) if file.is_file() else {}
        same = result.get('settings') == run.settings
        if same:
            write_json(self.results / f'{run.key}.json', result)
        return same

    def _next(self) -> Run | None:
        """The first run that can start, or the run whose checkpoint it starts from, if that is missing."""
        waiting = self.failed | set(self.active)
        for run in self._left():
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
        """Last checkpoint of a finished run."""
        if key is None or not (self.work_dir / key / 'result.json').is_file():
            return None
        checkpoint = (self.work_dir / key / 'last_checkpoint').read_text()
        return checkpoint if Path(checkpoint).is_file() else None

    def _start(self, run: Run) -> None:
        folder = self.work_dir / run.key
        described = dict(run=asdict(run), data_root=str(self.data_root), checkpoint=self._checkpoint(run.start))
        self._set_aside_other_settings(folder, run)
        write_json(folder / 'run.json', described)
        self.active[run.key] = run, self._launch(folder, folder / 'log.txt', run.threads), time.monotonic()
        print(f'{run.key} started, log: {folder / "log.txt"}', flush=True)

    def _launch(self, folder: Path, log: Path, threads: int) -> subprocess.Popen:
        """Start a process for the run described in a folder."""
        with log.open('a') as output:
            command = [sys.executable, '-m', 'benchmarks.evidence.run', str(folder)]
            environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def _set_aside_other_settings(self, folder: Path, run: Run) -> None:
        """Rename a work dir of a run with other settings, so that it is not resumed."""
        file = folder / 'run.json'
        if file.is_file() and settings_of(json.loads(file.read_text())['run']) != run.settings:
            folder.rename(folder.with_name(f'{folder.name}.old-{time.time():.0f}'))

    def _collect(self) -> bool:
        """Collect the results of finished runs; return whether there were any."""
        ended = [key for key, (_, process, _) in self.active.items() if process.poll() is not None]
        for key in ended:
            run, process, began = self.active.pop(key)
            minutes = (time.monotonic() - began) / 60
            file = self.work_dir / key / 'result.json'
            if process.returncode or not file.is_file():
                self.failed.add(key)
                print(f'{key} failed: {_last_line(self.work_dir / key / "log.txt")}', flush=True)
                continue
            self.spent += minutes * run.threads
            self.expected += expected_minutes(run)
            result = json.loads(file.read_text())
            write_json(self.results / f'{key}.json', result)
            found = ', '.join(f'{name} {result[name]:.4f}' for name in run.metrics)
            print(f'{key} finished after {minutes:.1f} minutes: {found}', flush=True)
        return bool(ended)

    def _progress(self) -> str:
        """Progress and ETA of all runs, at the pace of the finished ones."""
        results = read_results(self.results)
        runs = self.runs(results)
        done = sum(is_done(run, results) for run in runs)
        pace = self.spent / self.expected if self.expected else 1.0
        left = (
            sum(expected_minutes(run) for run in runs if not is_done(run, results) and run.key not in self.failed)
            * pace
        )
        for run, _, began in self.active.values():
            left -= (time.monotonic() - began) / 60 * run.threads
        hours = max(left, 0) / 60 / self.jobs
        names = ', '.join(self.active) or 'none'
        failed = f', {len(self.failed)} failed' if self.failed else ''
        return f'{done} of {len(runs)} runs done{failed}; running: {names}; about {hours:.1f} hours left'


def _last_line(file: Path) -> str:
    lines = file.read_text().strip().splitlines()
    return lines[-1] if lines else 'no output'


def print_list(runs: list[Run], results: Results) -> None:
    """Print one line per run: its metrics, or its expected duration."""
    for run in runs:
        if is_done(run, results):
            state = ', '.join(f'{name} {results[run.key][name]:.4f}' for name in run.metrics)
        else:
            state = 'waits for other runs' if run.waits else f'about {expected_minutes(run):.0f} minutes'
        print(f'{run.key:50} {state}')
    left = sum(expected_minutes(run) for run in runs if not is_done(run, results)) / 60
    done = sum(is_done(run, results) for run in runs)
    print(f'{done} of {len(runs)} runs done, about {left:.1f} hours left on one core')
