"""Time, memory and work of models, side by side in one run."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
        dtype: What its products are computed in.
        difference: Largest difference of outputs from those of the modules in float32, relative to the largest
            output; None in training and of detectors.
        seconds: Of each round, after warm-up.
        q1, median, q3: Quartiles of the seconds.
        images_per_second: At the median.
        peak_mib: Largest memory in use beyond what was in use before the step (weights), MiB; None where it is not
            PyTorch's.
        params, flops: Of the model; multiply-adds of one image.
        gflops: Floating point operations per second at the median, two to a multiply-add, three times as many in
            training, in 10^9.
        of_ceiling: The same over what a large matrix product in ``dtype`` reaches in this run.
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


def run_benchmark(specs: Sequence[Spec], settings: Settings, skip_failing: bool = False) -> dict:
    """Measure models in interleaved rounds.

    Each round runs every model once, in turn, so that slow moments of a machine meet all of them.

    Args:
        specs: Models.
        settings: How to measure.
        skip_failing: Leave out models that cannot be prepared or run, with their errors. Defaults to False.

    Returns:
        A dict for JSON: ``environment``, ``settings``, ``ceiling_gflops`` of each dtype, ``results``, one per
        model, mode and shape (:class:`Result`), and ``failed``, label -> error.

    Raises:
        ValueError: Two models have one label, a runtime cannot do what is asked, or a model computes wrong values.
    """
    labels = [spec.label for spec in specs]
    if len(set(labels)) < len(labels):
        raise ValueError(f'models need labels of their own (LABEL=MODEL), but got {", ".join(labels)}')
    results, differences, failed = [], {}, {}
    attempt = partial(_attempt, failed) if skip_failing else _run
    candidates = [attempt(spec, lambda spec=spec: Candidate(spec, settings)) for spec in specs]
    candidates = [candidate for candidate in candidates if candidate is not None]
    ceilings = {candidate.dtype: [] for candidate in candidates}
    cases = [(mode, tuple(shape)) for mode in settings.modes for shape in settings.shapes]
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        rounds = settings.warmup + settings.rounds
        task = progress.add_task('benchmark', total=len(candidates) * (len(settings.shapes) + len(cases) * rounds))
        for candidate, shape in product(candidates, map(tuple, settings.shapes)):  # before training moves statistics
            progress.update(task, advance=1, description=f'prepare {candidate.spec.label}')
            if 'inference' in settings.modes:
                differences[candidate, shape] = attempt(candidate.spec, partial(candidate.difference, shape))
        for mode, shape in cases:
            progress.update(task, description=f'{mode} {shape[0]}x{shape[1]}')
            steps = {}
            for candidate in candidates:
                if candidate.spec.label not in failed:
                    steps[candidate] = attempt(candidate.spec, partial(_first_step, candidate, mode, shape))
            steps = {candidate: step for candidate, step in steps.items() if step is not None}
            seconds = _run_rounds(list(steps.values()), settings, ceilings, lambda: progress.advance(task))
            for candidate, own in zip(steps, seconds):
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
        failed=failed,
    )


def _run(spec: Spec, function: Callable):
    return function()


def _attempt(failed: dict[str, str], spec: Spec, function: Callable):
    """What a function gives, or None where it fails, with its error noted."""
    try:
        return function()
    except Exception as error:  # of any model, compiler or device
        failed[spec.label] = f'{type(error).__name__}: {str(error).strip()[:500]}'
        return None


def _first_step(candidate: Candidate, mode: str, shape: tuple[int, int]) -> Callable:
    """A step that has run once, so that what fails or has to be compiled does so here."""
    step = candidate.step(mode, shape)
    if candidate.settings.round_seconds:
        step()
    return step


def _run_rounds(
    steps: Sequence[Callable], settings: Settings, ceilings: dict[str, list[float]], advance: Callable[[], None]
) -> list[list[float]]:
    """Seconds of each step in each round after warm-up; each round adds one to each of ``ceilings``."""
    seconds, repeats = [[] for _ in steps], [1] * len(steps)
    for number in range(settings.warmup + settings.rounds):
        for dtype, values in ceilings.items():
            values.append(matmul_gflops(dtype, settings.device, settings.ceiling_side))
        for i, (step, own) in enumerate(zip(steps, seconds)):
            own.append(seconds_of(step, settings.device, repeats[i]))
            if number < settings.warmup:
                repeats[i] = max(1, round(settings.round_seconds / max(own[-1], 1e-6)))
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
