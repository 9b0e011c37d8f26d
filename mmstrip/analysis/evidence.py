"""The evidence: trainings on public images that test the paper's claims, as `make evidence` works through them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from .runs import Metrics, Run, write_json

TOP1: Metrics = {'top-1': ('accuracy/top1', 100)}
RATES = (5e-4, 1e-3)
SEEDS = (0, 1, 2)
RATE = 'optim_wrapper.optimizer.lr'
EPOCHS = 'train_cfg.max_epochs'
BACKBONE = 'model.backbone'

# Config of each model on Caltech-101 -> minutes that one core takes for an epoch, about.
CALTECH101 = {
    'strip-mlp-tiny-light': ('strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py', 1.6),
    'resnet18': ('comparison/resnet18_1xb32_caltech101-64px.py', 1.2),
    'resnet50': ('comparison/resnet50_1xb32_caltech101-64px.py', 2.8),
    'convnext-tiny': ('comparison/convnext-tiny_1xb32_caltech101-64px.py', 2.8),
    'swin-tiny': ('comparison/swin-tiny_1xb32_caltech101-64px.py', 2.8),
}
LIKELY_PLACES = ('strip-mlp-tiny-light', 'resnet50')
CALTECH101_EPOCHS, CHOOSING_EPOCHS = 12, 3

# Network on Fashion-MNIST -> side of its images, learning rate, minutes that one core takes for an epoch, about, epochs
# of the whole run (1: the network is only tried), precision and threads.
FASHION_MNIST = {
    'strip-mlp-tiny-light': (32, 1e-3, 6, 1, {}),
    'strip-mlp-nano': (64, 1e-3, 6, 20, {}),
    'strip-mlp-pico': (128, 2e-3, 5, 32, dict(amp='bfloat16', threads=2)),
}
FASHION_MNIST_CHOOSING_EPOCHS = 1

ABLATIONS = 'strip_mlp/strip-mlp-pico_1xb128_cifar10-64px.py'
ABLATIONS_EPOCHS, ABLATIONS_CHOOSING_EPOCHS = 5, 1
ABLATIONS_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ABLATIONS_SEEDS = tuple(range(6))
# Variant -> arguments of the backbone. First the network that the others vary, then these in the order of their worth;
# the first two with the first three seeds are the pilot.
VARIANTS = {
    'shared': {},
    'channel-patches-1': {'num_patches': 1},
    'branches-lsmm': {'branches': ['lsmm']},
    'branches-cgsmm': {'branches': ['cgsmm']},
    'rows-and-columns-parallel': {'cascade': False},
    'strip-width-1': {'strip_width': 1},
    'strip-width-7': {'strip_width': 7},
}


class Task(NamedTuple):
    """A detector or segmentor of part 4.

    Attributes:
        epochs: Of a whole run.
        choosing_epochs: Of one that chooses the learning rate.
        image: Channels, height and width that multiply-adds are counted at.
        metrics: As of :class:`Run`, the main one first.
        models: Backbone -> its config, and the minutes that one core takes, about.
    """

    epochs: int
    choosing_epochs: int
    image: tuple[int, int, int]
    metrics: Metrics
    models: dict[str, tuple[str, float]]


TRANSFER = {
    'bccd': Task(
        epochs=12,
        choosing_epochs=3,
        image=(3, 240, 320),
        metrics={'AP50': ('pascal_voc/mAP', 1)},
        models={
            'strip-mlp-tiny-light': ('detection/retinanet_strip-mlp-tiny-light_fpn_1xb8_bccd.py', 36),
            'resnet18': ('comparison/retinanet_resnet18_fpn_1xb8_bccd.py', 24),
        },
    ),
    'camvid': Task(
        epochs=16,
        choosing_epochs=2,
        image=(3, 180, 240),
        metrics={'mIoU': ('mIoU', 100)},
        models={
            'strip-mlp-tiny-light': ('segmentation/strip-mlp-tiny-light_fpn_1xb4_camvid.py', 40),
            'resnet18': ('comparison/resnet18_fpn_1xb4_camvid.py', 27),
        },
    ),
}

CIFAR10 = 'strip_mlp/strip-mlp-tiny-light_caltech101-pre_1xb64_cifar10-64px.py'

DIGIT_SCENES = 'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py'
# What was tried to find out why the segmentor of digit scenes is poor -> options, and how much longer it takes.
DIGIT_SCENES_TRIALS = {
    'as-it-is': ({}, 1),
    'four-times-the-epochs': ({EPOCHS: 20, 'param_scheduler.1.end': 20}, 4),
    'three-times-the-rate': ({RATE: 3e-3}, 1),
    'both-of-these': ({EPOCHS: 20, 'param_scheduler.1.end': 20, RATE: 3e-3}, 4),
    'backbone-at-the-heads-rate': ({'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult': 1.0}, 1),
    'no-norm-in-the-neck': ({'model.neck.norm_cfg': None}, 1),
    'windows-of-the-whole-map': ({f'{BACKBONE}.img_size': 96}, 1),
    'background-at-full-weight': ({'model.decode_head.loss_decode.class_weight': None}, 1),
}

Results = dict[str, dict]


def caltech101(results: Results) -> list[Run]:
    """Part 1: Strip-MLP-T* against its peers, from scratch: for each, short runs that choose its rate, then seed 0."""
    return [run for runs in caltech101_runs(results) for run in runs]


def caltech101_seeds(results: Results) -> list[Run]:
    """Part 1: further seeds of the first two on the held-out images."""
    first = [runs[-1] for runs in caltech101_runs(results)]
    best = first_places(first, results, 2)
    places = best or LIKELY_PLACES  # until they are known, for the estimate of the time
    chosen = [run for run in first if run.name.rpartition('_')[0] in places]
    return [
        replace(run, name=f'{run.name[:-1]}{seed}', seed=seed, waits=run.waits or not best)
        for seed in SEEDS[1:]
        for run in chosen
    ]


def caltech101_runs(results: Results) -> list[list[Run]]:
    """For each model those that choose its learning rate, then seed 0."""
    models = []
    for model, (config, cost) in CALTECH101.items():
        run = Run('caltech101', f'{model}_seed0', config, TOP1, {EPOCHS: CALTECH101_EPOCHS})
        run = replace(run, core_minutes=cost * CALTECH101_EPOCHS)
        choosing = choose_rate(run, model, RATES, CHOOSING_EPOCHS)
        models.append([*choosing, with_rate(run, choosing, results)])
    return models


def fashion_mnist(results: Results) -> list[Run]:
    """Part 2, a figure that anyone can check: networks and sizes of images tried for one epoch, then the small ones."""
    runs = []
    for model, (side, rate, minutes, epochs, how) in FASHION_MNIST.items():
        config = f'strip_mlp/{model}_1xb64_fashion-mnist-{side}px.py'
        run = Run('fashion-mnist', f'{model}_seed0', config, TOP1, {EPOCHS: epochs, RATE: rate}, **how)
        run = replace(run, image=(3, side, side), core_minutes=epochs * minutes)
        choosing = choose_rate(run, model, [rate], FASHION_MNIST_CHOOSING_EPOCHS)
        runs += choosing
        if epochs > FASHION_MNIST_CHOOSING_EPOCHS:
            runs.append(with_rate(run, choosing, results))
    return runs


def ablations(results: Results) -> list[Run]:
    """Part 3: what the paper's Tables 6 to 9 vary, with six seeds each, at the rate of the shared network."""
    run = Run('ablations', '', ABLATIONS, TOP1, {EPOCHS: ABLATIONS_EPOCHS}, core_minutes=12, amp='bfloat16')
    choosing = choose_rate(run, 'pico', ABLATIONS_RATES, ABLATIONS_CHOOSING_EPOCHS)
    rated = with_rate(run, choosing, results)
    shared, first, *others = VARIANTS
    order = [(variant, seed) for seed in ABLATIONS_SEEDS for variant in (shared, first)]
    order += [(variant, seed) for variant in others for seed in ABLATIONS_SEEDS]
    runs = []
    for variant, seed in order:
        changes = {f'{BACKBONE}.{key}': value for key, value in VARIANTS[variant].items()}
        name = f'{variant}_seed{seed}'
        runs.append(replace(rated, name=name, seed=seed, options={**rated.options, **changes}))
    return choosing + runs


def transfer(results: Results) -> list[Run]:
    """Part 4: a detector and a segmentor, each from its backbone's classifier of part 1 and from scratch."""
    runs = []
    for key, task in TRANSFER.items():
        for model, (config, minutes) in task.models.items():
            for start in ('classifier', 'scratch'):
                name = transfer_name(key, model, start)
                options = {EPOCHS: task.epochs} | ({f'{BACKBONE}.init_cfg': None} if start == 'scratch' else {})
                run = Run('transfer', name, config, task.metrics, options, core_minutes=minutes, image=task.image)
                if start == 'classifier':
                    run = replace(run, start=f'caltech101/{model}_seed0')
                choosing = choose_rate(run, name, RATES, task.choosing_epochs)
                runs += [*choosing, with_rate(run, choosing, results)]
    return runs


def transfer_name(task: str, model: str, start: str) -> str:
    """Name of a run of part 4 in file names."""
    return f'{task}_{model}_from-{start}'


def cifar10(results: Results) -> list[Run]:
    """Part 4: a classifier of CIFAR-10 as JPEG, from that of Caltech-101 and from scratch.

    The learning rate that was chosen on Caltech-101 serves both.
    """
    caltech101_rate = caltech101_runs(results)[0][-1].options.get(RATE)
    options = {EPOCHS: 2, RATE: caltech101_rate}
    run = Run('cifar10', 'from-classifier', CIFAR10, TOP1, options, core_minutes=30, waits=caltech101_rate is None)
    scratch = replace(run, name='from-scratch', options={**options, f'{BACKBONE}.init_cfg': None})
    return [replace(run, start='caltech101/strip-mlp-tiny-light_seed0'), scratch]


def digit_scenes(results: Results) -> list[Run]:
    """Part 4: a segmentor of digit scenes from scratch, with one thing changed in each run."""
    run = Run('digit-scenes', '', DIGIT_SCENES, {'mIoU': ('mIoU', 100)}, choosing=True, image=(3, 96, 96))
    return [
        replace(run, name=name, options={EPOCHS: 5, **options}, core_minutes=8 * cost)
        for name, (options, cost) in DIGIT_SCENES_TRIALS.items()
    ]


def choose_rate(run: Run, name: str, rates: Iterable[float], epochs: int) -> list[Run]:
    """Short runs that choose a learning rate for a whole one."""
    short = replace(run, choosing=True, core_minutes=run.core_minutes / run.options[EPOCHS] * epochs)
    return [
        replace(short, name=f'choose_{name}_lr{rate:g}', options={**run.options, EPOCHS: epochs, RATE: rate})
        for rate in rates
    ]


def with_rate(run: Run, choosing: list[Run], results: Results) -> Run:
    """A run with the settings that were best in short runs; it waits until all of them have been tried."""
    if not all(is_done(run, results) for run in choosing):
        return replace(run, waits=True)
    best = max(choosing, key=lambda one: results[one.key][next(iter(one.metrics))])
    return replace(run, config=best.config, image=best.image, options={**best.options, EPOCHS: run.options[EPOCHS]})


def first_places(runs: list[Run], results: Results, count: int) -> set[str] | None:
    """The models whose runs are best at their last validation, on held-out images; None while one is missing."""
    if not all(is_done(run, results) for run in runs):
        return None
    metric = next(iter(runs[0].metrics))
    order = sorted(runs, key=lambda run: results[run.key]['curve'][-1][metric], reverse=True)
    return {run.name.rpartition('_')[0] for run in order[:count]}


# In the order in which they are worth most.
PLAN: list[tuple[str, Callable[[Results], list[Run]]]] = [
    ('caltech101', caltech101),
    ('fashion-mnist', fashion_mnist),
    ('caltech101', caltech101_seeds),
    ('ablations', ablations),
    ('transfer', transfer),
    ('cifar10', cifar10),
    ('digit-scenes', digit_scenes),
]
PARTS = tuple(dict.fromkeys(part for part, _ in PLAN))


def declared(parts: Collection[str], results: Results) -> list[Run]:
    """All runs of some parts, in their order; settings that hang on others' results too.

    Args:
        parts: Names from ``PARTS``.
        results: What :func:`read_results` gives.
    """
    return [run for part, runs in PLAN if part in parts for run in runs(results)]


def read_results(folder: Path) -> Results:
    """Results by ``{part}/{name}``, from the JSON files of a folder."""
    return {str(file.relative_to(folder))[:-5]: json.loads(file.read_text()) for file in folder.glob('*/*.json')}


def is_done(run: Run, results: Results) -> bool:
    """Whether a run has its result, of the same settings."""
    return run.key in results and results[run.key]['settings'] == run.settings


class Queue:
    """Works through runs, each in a process of its own.

    Args:
        runs: Gives the runs for the results that there are.
        results: Folder of the results, ``{part}/{name}.json``; a run that has its own there is not run again.
        work_dir: Folder of logs and checkpoints, ``{part}/{name}/``; a run that was stopped resumes from there.
        data_root: Folder that stands for ``data/`` of the configs.
        jobs: Cores to use; a run begins when one is free.
    """

    def __init__(
        self, runs: Callable[[Results], list[Run]], results: Path, work_dir: Path, data_root: str, jobs: int = 1
    ):
        self.runs, self.results, self.work_dir, self.data_root, self.jobs = runs, results, work_dir, data_root, jobs
        self.active: dict[str, tuple[Run, subprocess.Popen, float]] = {}
        self.failed: set[str] = set()
        self.spent = self.expected = 0.0  # minutes of cores, of the runs that have ended here

    def work(self, report_every: float = 300.0) -> int:
        """Run all that have no result; the number of those that failed or could not begin.

        Args:
            report_every: Seconds between two lines on what is going on. Defaults to 300.
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
        ended = [run for run in left if run.key not in self.active and self._take_over(run)]
        return self._left() if ended else left

    def _take_over(self, run: Run) -> bool:
        """Copy the result of a run that has ended without being waited for, if there is one."""
        file = self.work_dir / run.key / 'result.json'
        result = json.loads(file.read_text()) if file.is_file() else {}
        same = result.get('settings') == run.settings
        if same:
            write_json(self.results / f'{run.key}.json', result)
        return same

    def _next(self) -> Run | None:
        """The first one that can begin; before it, again, the one whose checkpoint it starts from, if that is gone."""
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
        self.active[run.key] = run, self._launch(folder, folder / 'log.txt', run.threads), time.monotonic()
        print(f'{run.key} begins, log: {folder / "log.txt"}', flush=True)

    def _launch(self, folder: Path, log: Path, threads: int) -> subprocess.Popen:
        """The process that executes the run that a folder describes."""
        with log.open('a') as output:
            command = [sys.executable, '-m', 'mmstrip.analysis.runs', str(folder)]
            environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

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
            self.spent += minutes * run.threads
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
