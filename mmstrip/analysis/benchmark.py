"""Time, memory and work of models, side by side in one run."""

import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from ..models import native
from ..models.plain_ops import plain_formulas
from .complexity import PlainForward, analyze_complexity, data_samples
from .launch import load_config
from .plots import plot_benchmark

FORMS = ('channels_last', 'compile', 'cudagraphs', 'deploy', 'dynamic', 'plain', 'python')
MODES = ('inference', 'train')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
MODULE = 'module:'  # marks a module's range in a profile
CEILING_SIDE = {'cpu': 2048, 'cuda': 8192}


@dataclass(frozen=True)
class Spec:
    """What to measure: ``[LABEL=]CONFIG.py`` or ``[LABEL=]TYPE[:KEY=VALUE,...]``, then ``@FORM`` for each form.

    Attributes:
        label: Name in tables.
        source: Config file, or type of a registered backbone with its scope, such as 'mmpretrain.SwinTransformer'.
        arguments: Arguments of the backbone.
        forms: Some of :data:`FORMS`: 'channels_last' memory; 'compile', with 'dynamic' for sizes that change or
            'cudagraphs'; 'deploy', by ``switch_to_deploy()``; 'plain', Strip-MLP on its plain formulas;
            'python', without its compiled operators.
    """

    label: str
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)
    forms: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> 'Spec':
        """Raises ValueError for an unknown form or an argument without a value."""
        body, *forms = text.split('@')
        unknown = [form for form in forms if form not in FORMS]
        if unknown:
            raise ValueError(f'{text}: forms are {", ".join(FORMS)}, but got {", ".join(unknown)}')
        head = body.split(':')[0]
        label, source = body.split('=', 1) if '=' in head else (None, body)
        source, _, listed = source.partition(':')
        arguments = {}
        for item in filter(None, listed.split(',')):
            key, sign, value = item.partition('=')
            if not sign:
                raise ValueError(f'{text}: arguments are written KEY=VALUE, but got {item!r}')
            arguments[key] = _literal(value)
        name = label or '-'.join(
            [Path(source).stem if source.endswith('.py') else source.split('.')[-1], *map(str, arguments.values())]
        )
        return cls(' '.join([name, *(f'@{form}' for form in forms)]), source, arguments, tuple(forms))

    def build(self) -> nn.Module:
        """The model, without its weights' checkpoint.

        Raises:
            FileNotFoundError: There is no such config.
            ValueError: The type is not registered, or 'deploy' is asked of what has no such form.
        """
        if self.source.endswith('.py'):
            config = load_config(self.source)
            init_default_scope(config.get('default_scope', 'mmengine'))
            model = MODELS.build(config.model)
        else:
            scope = self.source.partition('.')[0]
            if '.' in self.source:
                import_modules_from_strings(f'{scope}.models')
            if MODELS.get(self.source) is None:
                raise ValueError(f'no model {self.source!r} is registered; write its scope, as mmpretrain.ResNet')
            model = MODELS.build(dict(type=self.source, **self.arguments))
        if 'deploy' in self.forms:
            backbone = getattr(model, 'backbone', model)
            if not hasattr(backbone, 'switch_to_deploy'):
                raise ValueError(f'{self.label}: {type(backbone).__name__} has no deploy form')
            backbone.switch_to_deploy()
        return model


def _literal(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


@dataclass
class Result:
    """One model at one shape in one mode.

    Attributes:
        label, mode, shape: What was measured; (H, W) in pixels.
        seconds: Of each round, after warm-up.
        q1, median, q3: Quartiles of the seconds.
        images_per_second: At the median.
        peak_mib: Largest memory in use beyond what was in use before the step (weights), MiB.
        params, flops: Of the model; multiply-adds of one image.
        gflops: Floating point operations per second at the median, two to a multiply-add, three times as many in
            training, in 10^9.
        of_ceiling: The same over what a large matrix product reaches in this run.
    """

    label: str
    mode: str
    shape: tuple[int, int]
    seconds: list[float]
    q1: float
    median: float
    q3: float
    images_per_second: float
    peak_mib: float
    params: int
    flops: int
    gflops: float
    of_ceiling: float


@dataclass
class Settings:
    """How to measure: see the options of ``tools/analysis_tools/benchmark.py``."""

    modes: Sequence[str] = ('inference',)
    batch: int = 8
    shapes: Sequence[tuple[int, int]] = ((224, 224),)
    channels: int = 3
    dtype: str = 'float32'
    device: str = 'cpu'
    rounds: int = 10
    warmup: int = 2


class Candidate:
    """A model that is ready to run steps."""

    def __init__(self, spec: Spec, settings: Settings):
        self.spec, self.settings = spec, settings
        # Unless asked for, weights stay in the layout that their model gave them.
        self.memory_format = torch.channels_last if 'channels_last' in spec.forms else torch.preserve_format
        self.model = spec.build().to(settings.device, memory_format=self.memory_format)
        self.call = self.model
        # Of a fresh copy, once for all modes.
        self.complexity = cache(lambda shape: analyze_complexity(spec.build(), (settings.channels, *shape)))
        if 'compile' in spec.forms:
            mode = 'reduce-overhead' if 'cudagraphs' in spec.forms else None
            self.call = torch.compile(self.model, dynamic=True if 'dynamic' in spec.forms else None, mode=mode)

    def step(self, mode: str, shape: tuple[int, int]) -> Callable[[], None]:
        """A forward pass, in training with the backward pass of a sum, on fixed random images."""
        settings = self.settings
        images = torch.rand(settings.batch, settings.channels, *shape, device=settings.device)
        images = images.to(memory_format=self.memory_format)
        self.model.train(mode == 'train')
        samples = data_samples(self.model, (settings.channels, *shape), settings.batch)
        forward = PlainForward(self.call, samples) if hasattr(self.model, 'data_preprocessor') else self.call

        def run() -> None:
            with ExitStack() as stack:
                if 'plain' in self.spec.forms:
                    stack.enter_context(plain_formulas())
                if 'python' in self.spec.forms:
                    stack.enter_context(native.switched_off())
                with self._precision(), torch.set_grad_enabled(mode == 'train'):
                    outputs = forward(images)
                if mode == 'train':
                    loss = sum(leaf.float().mean() for leaf in tree_leaves(outputs) if _has_gradient(leaf))
                    loss.backward()
                    self.model.zero_grad(set_to_none=True)

        return run

    def _precision(self):
        if self.settings.dtype == 'float32':
            return nullcontext()
        return torch.autocast(torch.device(self.settings.device).type, DTYPES[self.settings.dtype])


def _has_gradient(leaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def run_benchmark(specs: Sequence[Spec], settings: Settings) -> dict:
    """Measure models in interleaved rounds.

    Each round runs every model once, in turn, so that slow moments of a machine meet all of them.

    Args:
        specs: Models.
        settings: How to measure.

    Returns:
        A dict for JSON: ``environment``, ``settings``, ``ceiling_gflops`` and ``results``, one per model, mode and
        shape (:class:`Result`).

    Raises:
        ValueError: Two models have one label.
    """
    labels = [spec.label for spec in specs]
    if len(set(labels)) < len(labels):
        raise ValueError(f'models need labels of their own (LABEL=MODEL), but got {", ".join(labels)}')
    candidates = [Candidate(spec, settings) for spec in specs]
    results, ceilings = [], []
    cases = [(mode, tuple(shape)) for mode in settings.modes for shape in settings.shapes]
    steps = len(cases) * len(candidates) * (settings.warmup + settings.rounds)
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task('benchmark', total=steps)
        for mode, shape in cases:
            seconds = {candidate.spec.label: [] for candidate in candidates}
            for number in range(settings.warmup + settings.rounds):
                ceilings.append(_ceiling(settings))
                for candidate in candidates:
                    spent = _seconds(candidate.step(mode, shape), settings.device)
                    if number >= settings.warmup:
                        seconds[candidate.spec.label].append(spent)
                    progress.update(task, advance=1, description=f'{mode} {shape[0]}x{shape[1]}')
            for candidate in candidates:
                results.append(_summarise(candidate, mode, shape, seconds[candidate.spec.label]))
    ceiling = median(ceilings)
    for result in results:
        result.of_ceiling = result.gflops / ceiling
    return dict(
        environment=_environment(settings),
        settings=asdict(settings),
        ceiling_gflops=ceiling,
        results=[asdict(result) for result in results],
    )


def _seconds(run: Callable[[], None], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def _ceiling(settings: Settings) -> float:
    """GFLOP/s of one large matrix product."""
    side = CEILING_SIDE[torch.device(settings.device).type]
    matrix = torch.rand(side, side, device=settings.device, dtype=DTYPES[settings.dtype])
    return 2 * side**3 / _seconds(lambda: matrix @ matrix, settings.device) / 1e9


def _summarise(candidate: Candidate, mode: str, shape: tuple[int, int], seconds: list[float]) -> Result:
    settings, spec = candidate.settings, candidate.spec
    q1, middle, q3 = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    peak = peak_memory(candidate.step(mode, shape), settings.device)
    complexity = candidate.complexity(shape)
    work = 2 * complexity.flops * settings.batch * (3 if mode == 'train' else 1)
    return Result(
        label=spec.label,
        mode=mode,
        shape=shape,
        seconds=seconds,
        q1=q1,
        median=middle,
        q3=q3,
        images_per_second=settings.batch / middle,
        peak_mib=peak / 2**20,
        params=complexity.params,
        flops=complexity.flops,
        gflops=work / middle / 1e9,
        of_ceiling=float('nan'),
    )


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Bytes that a step needs at its peak beyond those in use before it, as PyTorch's allocators count them."""
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def _environment(settings: Settings) -> dict[str, str]:
    cuda = settings.device.startswith('cuda')
    return dict(
        device=torch.cuda.get_device_name() if cuda else _cpu_name(),
        threads=str(torch.get_num_threads()),
        torch=torch.__version__,
        python=platform.python_version(),
        compiled_operators=str(native.in_use()),
        tf32=str(torch.backends.cuda.matmul.allow_tf32 if cuda else False),
    )


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    names = [line.partition(':')[2].strip() for line in info.read_text().splitlines() if line.startswith('model name')]
    return names[0] if names else platform.processor()


def print_report(report: dict) -> None:
    """The tables of a report, one for each mode and shape; ratios are to the first model's time."""
    environment, settings = report['environment'], report['settings']
    console = Console(width=160)
    console.print(
        f'{environment["device"]}, {environment["threads"]} threads, torch {environment["torch"]}, '
        f'compiled operators in use: {environment["compiled_operators"]}, batch {settings["batch"]}, '
        f'{settings["dtype"]}, {settings["rounds"]} rounds; '
        f'a large matrix product: {report["ceiling_gflops"]:,.0f} GFLOP/s',
        highlight=False,
    )
    for (mode, shape), results in _by_case(report).items():
        table = Table(title=f'{mode}, {shape[0]}x{shape[1]}')
        table.add_column('model')
        for head in (
            'ms',
            'quartiles',
            'images/s',
            'speed',
            'peak MiB',
            'params M',
            'FLOPs G',
            'GFLOP/s',
            'of ceiling',
        ):
            table.add_column(head, justify='right')
        for result in results:
            table.add_row(
                result['label'],
                f'{1e3 * result["median"]:.1f}',
                f'{1e3 * result["q1"]:.1f}-{1e3 * result["q3"]:.1f}',
                f'{result["images_per_second"]:.1f}',
                f'{paired_ratio(results[0], result):.2f}x',
                f'{result["peak_mib"]:.0f}',
                f'{result["params"] / 1e6:.1f}',
                f'{result["flops"] / 1e9:.2f}',
                f'{result["gflops"]:,.0f}',
                f'{result["of_ceiling"]:.0%}',
            )
        console.print(table)


def paired_ratio(first: dict, other: dict) -> float:
    """How many times as fast ``other`` is as ``first``: the median over rounds, each compared with itself."""
    return median(a / b for a, b in zip(first['seconds'], other['seconds']))


def _by_case(report: dict) -> dict[tuple, list[dict]]:
    cases = {}
    for result in report['results']:
        cases.setdefault((result['mode'], tuple(result['shape'])), []).append(result)
    return cases


def save_report(report: dict, folder: Path) -> None:
    """Write ``benchmark.json``, and ``benchmark_{mode}.png``: throughput against FLOPs, time against resolution."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'benchmark.json').write_text(json.dumps(report, indent=1))
    for mode in report['settings']['modes']:
        results = [result for result in report['results'] if result['mode'] == mode]
        plot_benchmark(results, f'{mode}, {report["environment"]["device"]}', folder / f'benchmark_{mode}.png')


def costliest_operations(spec: Spec, settings: Settings, mode: str, count: int = 10) -> list[tuple[str, str, float]]:
    """Where a model's time goes.

    Args:
        spec: The model.
        settings: How to run it.
        mode: 'inference' or 'train'.
        count: Rows wanted. Defaults to 10.

    Returns:
        Module (block numbers as *), operation, and share of the time, the costliest first.
    """
    candidate = Candidate(spec, settings)
    for name, module in candidate.model.named_modules():
        if name:
            _mark(module, MODULE + re.sub(r'(\.\d+)\.\d+', r'\1.*', name))
    run = candidate.step(mode, tuple(settings.shapes[0]))
    for _ in range(settings.warmup):
        run()
    cuda = settings.device.startswith('cuda')
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        run()
    events = profiler.events()
    # An operation and its gradient share a number.
    modules = {
        event.sequence_nr: _module_of(event) for event in events if event.sequence_nr >= 0 and not _gradient(event)
    }
    spent = {}
    for event in events:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own and not event.name.startswith(MODULE):
            gradient = _gradient(event)
            module = modules.get(gradient.sequence_nr, '(model)') if gradient else _module_of(event)
            key = module, event.name + ' (backward)' * bool(gradient)
            spent[key] = spent.get(key, 0) + own
    total = sum(spent.values())
    ranked = sorted(spent.items(), key=lambda item: -item[1])[:count]
    return [(module, operation, own / total) for (module, operation), own in ranked]


def _mark(module: nn.Module, name: str) -> None:
    open_ranges = []

    def enter(*_):
        open_ranges.append(torch.profiler.record_function(name).__enter__())

    def leave(*_):
        open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _module_of(event) -> str:
    while event is not None:
        if event.name.startswith(MODULE):
            return event.name[len(MODULE) :]
        event = event.cpu_parent
    return '(model)'


def _gradient(event):
    """The step of the backward pass that an event belongs to; None in the forward pass."""
    while event is not None and not event.name.startswith('autograd::engine::evaluate_function'):
        event = event.cpu_parent
    return event
