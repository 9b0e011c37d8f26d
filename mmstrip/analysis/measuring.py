"""Measuring one model: a step of it, its seconds and its memory."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from .complexity import TensorForward, analyze_complexity, data_samples
from .specs import Spec

MODES = ('inference', 'train')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
_CEILING_SIDE = {'cpu': 2048, 'cuda': 8192}


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
        forward = TensorForward(self.call, samples) if hasattr(self.model, 'data_preprocessor') else self.call

        def run() -> None:
            with self.spec.implementation():
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


def seconds_of(run: Callable[[], None], device: str) -> float:
    """Seconds of a step, to its end on the device."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def matmul_gflops(settings: Settings) -> float:
    """GFLOP/s of one large matrix product."""
    side = _CEILING_SIDE[torch.device(settings.device).type]
    matrix = torch.rand(side, side, device=settings.device, dtype=DTYPES[settings.dtype])
    return 2 * side**3 / seconds_of(lambda: matrix @ matrix, settings.device) / 1e9


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
