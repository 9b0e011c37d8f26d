"""Time, memory and FLOPs of models, side by side in one run."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.progress import Progress

from mmstrip import ops

from ..machine import cpu_name
from .measuring import Candidate, Settings, matmul_gflops, seconds_of
from .specs import Spec


@dataclass
class Result:
    """One model at one shape in one mode.

    Attributes:
        label, mode, shape: What was measured; (H, W) in pixels.
        dtype: Of its products.
        difference: Largest difference of outputs from those of the modules in float32, relative to the largest
            output; None in training and for detectors.
        seconds: Of each round after the warm-up.
        q1, median, q3: Quartiles of the seconds.
        images_per_second: At the median.
        peak_mib: Peak memory beyond what was in use before the step (weights), MiB; None outside of PyTorch.
        params, flops: Of the model; multiply-adds of one image.
        gflops: 10^9 floating-point operations per second at the median, two per multiply-add, three times as many in
            training.
        of_ceiling: ``gflops`` relative to a large matrix product in ``dtype`` in this run.
    """

    label: str
    mode: str
    shape: tuple[int, int]
    dtype: str
    difference: float | None
    seconds: list[float]
    q1: float
    median: float
    q3: float
    images_per_second: float
    peak_mib: float | None
    params: int
    flops: int
    gflops: float
    of_ceiling: float


def run_benchmark(specs: Sequence[Spec], settings: Settings) -> dict:
    """Measure models in interleaved rounds.

    Each round runs every model once, in turn, so that slow phases of the machine affect all of them.

    Returns:
        A dict for JSON: ``environment``, ``settings``, ``ceiling_gflops`` of each dtype, and ``results``, one
        :class:`Result` per model, mode and shape.

    Raises:
        ValueError: Two models have the same label, a runtime does not support the settings, or a model computes wrong
            values.
    """
    labels = [spec.label for spec in specs]
    if len(set(labels)) < len(labels):
        raise ValueError(f'models need different labels (LABEL=MODEL), but got {", ".join(labels)}')
    results, differences = [], {}
    candidates = [Candidate(spec, settings) for spec in specs]
    ceilings = {candidate.dtype: [] for candidate in candidates}
    cases = [(mode, tuple(shape)) for mode in settings.modes for shape in settings.shapes]
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        rounds = settings.warmup + settings.rounds
        task = progress.add_task('benchmark', total=len(candidates) * (len(settings.shapes) + len(cases) * rounds))
        for candidate, shape in product(candidates, map(tuple, settings.shapes)):  # before training moves statistics
            progress.update(task, advance=1, description=f'prepare {candidate.spec.label}')
            if 'inference' in settings.modes:
                differences[candidate, shape] = candidate.difference(shape)
        for mode, shape in cases:
            progress.update(task, description=f'{mode} {shape[0]}x{shape[1]}')
            steps = [candidate.step(mode, shape) for candidate in candidates]
            seconds = _run_rounds(steps, settings, ceilings, lambda: progress.advance(task))
            for candidate, own in zip(candidates, seconds):
                difference = differences[candidate, shape] if mode == 'inference' else None
                results.append(_summarise(candidate, mode, shape, difference, own))
    ceilings = {dtype: median(values) for dtype, values in ceilings.items()}
    for result in results:
        result.of_ceiling = result.gflops / ceilings[result.dtype]
    return dict(
        environment=_environment(settings),
        settings=asdict(settings),
        ceiling_gflops=ceilings,
        results=[asdict(result) for result in results],
    )


def _run_rounds(
    steps: Sequence[Callable], settings: Settings, ceilings: dict[str, list[float]], advance: Callable[[], None]
) -> list[list[float]]:
    """Seconds of each step in each round after the warm-up; each round adds one value to each of ``ceilings``."""
    seconds = [[] for _ in steps]
    for _ in range(settings.warmup + settings.rounds):
        for dtype, values in ceilings.items():
            values.append(matmul_gflops(dtype, settings.device))
        for step, own in zip(steps, seconds):
            own.append(seconds_of(step, settings.device))
            advance()
    return [own[settings.warmup :] for own in seconds]


def _summarise(
    candidate: Candidate, mode: str, shape: tuple[int, int], difference: float | None, seconds: list[float]
) -> Result:
    settings, spec = candidate.settings, candidate.spec
    q1, middle, q3 = quantiles(seconds, n=4, method='inclusive') if len(seconds) > 1 else seconds * 3
    peak = candidate.peak_mib(mode, shape)
    complexity = candidate.complexity(shape)
    work = 2 * complexity.flops * settings.batch * (3 if mode == 'train' else 1)
    return Result(
        label=spec.label,
        mode=mode,
        shape=shape,
        dtype=candidate.dtype,
        difference=difference,
        seconds=seconds,
        q1=q1,
        median=middle,
        q3=q3,
        images_per_second=settings.batch / middle,
        peak_mib=peak,
        params=complexity.params,
        flops=complexity.flops,
        gflops=work / middle / 1e9,
        of_ceiling=float('nan'),
    )


def _environment(settings: Settings) -> dict[str, str]:
    cuda = settings.device.startswith('cuda')
    return dict(
        device=torch.cuda.get_device_name() if cuda else cpu_name(),
        threads=str(torch.get_num_threads()),
        torch=torch.__version__,
        python=platform.python_version(),
        operators=ops.status(),
        tf32=str(torch.backends.cuda.matmul.allow_tf32 if cuda else False),
    )
