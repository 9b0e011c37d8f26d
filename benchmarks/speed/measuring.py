"""One model: its step, seconds and memory."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from mmstrip import accelerate
from mmstrip.analysis.complexity import TensorForward, analyze_complexity, data_samples
from mmstrip.deployment.formats import SUFFIXES, check_packages, halve, to_onnx, trace
from mmstrip.deployment.quantization import write_int8
from mmstrip.deployment.runtimes import RUNTIMES, Session
from mmstrip.models import StripMLP

from .specs import Spec

MODES = ('inference', 'train')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
TOLERANCES = {
    'float32': 1e-3,
    'lower': 5e-2,
    'int8': 0.5,
}  # of outputs; lower: of products or of weights
os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # else PyTorch's profiler prints two lines per measurement
_exported: dict[str, object] = {}  # ONNX models, shared by the runtimes
_FORMATS = {'onnxruntime': 'onnx', 'openvino': 'openvino'}  # of int8 files
_CEILING_SIDES = {'cpu': (256, 512, 1024, 2048), 'cuda': (8192,)}
_CEILING_SECONDS = 0.2
_GRAPH_WARMUP = 3


@dataclass
class Settings:
    """How to measure, see the options of ``python -m benchmarks.speed``."""

    modes: Sequence[str] = ('inference',)
    batch: int = 8
    shapes: Sequence[tuple[int, int]] = ((224, 224),)
    channels: int = 3
    dtype: str = 'float32'
    device: str = 'cpu'
    rounds: int = 10
    warmup: int = 2


class Candidate:
    """A model that is ready to run steps.

    Attributes:
        dtype (str): Of its products, one of :data:`DTYPES`.

    Raises:
        ValueError: Its runtime is not installed or does not support the settings; CUDA graphs without CUDA.
    """

    def __init__(self, spec: Spec, settings: Settings):
        self.spec, self.settings = spec, settings
        self.dtype = 'bfloat16' if {'autocast', 'bfloat16'} & set(spec.forms) else settings.dtype
        self.runtime = next((form for form in spec.forms if form in RUNTIMES), None)
        if self.runtime:
            self._check_runtime()
        if 'cudagraphs' in spec.forms and not settings.device.startswith('cuda'):
            raise ValueError(f'{spec.label}: CUDA graphs need CUDA, but the device is {settings.device}')
        self._graph_peaks: dict[tuple, int] = {}
        # By default, weights stay in the memory format that their model gave them.
        self.memory_format = torch.channels_last if 'channels_last' in spec.forms else torch.preserve_format
        own_dtype = torch.bfloat16 if 'bfloat16' in spec.forms and not self.runtime else torch.float32
        self.model = spec.build().to(settings.device, own_dtype, memory_format=self.memory_format)
        if spec.is_accelerated and any(isinstance(module, StripMLP) for module in self.model.modules()):
            accelerate(self.model)
        self.call = self.model
        # Of a new copy, once for all modes.
        self.complexity = cache(
            lambda shape: analyze_complexity(spec.build().to(settings.device), (settings.channels, *shape))
        )
        self.session = cache(self._start)
        if 'compile' in spec.forms:
            mode = 'reduce-overhead' if 'cudagraphs' in spec.forms else None
            self.call = torch.compile(self.model, dynamic=True if 'dynamic' in spec.forms else None, mode=mode)

    def _check_runtime(self) -> None:
        runtime, settings = self.runtime, self.settings
        check_packages(_FORMATS[runtime])
        if list(settings.modes) != ['inference']:
            raise ValueError(f'{runtime} runs inference only, but the modes are {", ".join(settings.modes)}')
        if settings.device != 'cpu':
            raise ValueError(f'{runtime} is measured on CPUs only, but the device is {settings.device}')
        if self.dtype == 'float16' or (runtime, self.dtype) == ('onnxruntime', 'bfloat16'):
            raise ValueError(f'{runtime} does not compute in {self.dtype} on CPUs')

    def step(self, mode: str, shape: tuple[int, int]) -> Callable:
        """A forward pass on fixed images that returns its outputs; in training, forward and backward."""
        self.model.train(mode == 'train')
        if self.runtime:
            session, array = self.session(shape), self._images(shape).numpy()
            return lambda: [torch.as_tensor(output) for output in session(array)]
        images = self._images(shape).to(self.settings.device, memory_format=self.memory_format)
        images = images.to(next(self.model.parameters()).dtype)
        forward = self._function(shape)

        def run():
            with self._freezing():
                with self._precision(), torch.set_grad_enabled(mode == 'train'):
                    outputs = forward(images)
                if mode == 'inference':
                    return outputs
                loss = sum(leaf.float().mean() for leaf in tree_leaves(outputs) if _has_gradient(leaf))
                loss.backward()
                self.model.zero_grad(set_to_none=True)

        return self._captured(run, (mode, shape)) if self._is_captured else run

    @property
    def _is_captured(self) -> bool:
        return 'cudagraphs' in self.spec.forms and 'compile' not in self.spec.forms

    def _captured(self, run: Callable, case: tuple) -> Callable:
        """A step as one CUDA graph; its next replay overwrites the outputs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_WARMUP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, outputs = torch.cuda.CUDAGraph(), []

        def capture():
            with torch.cuda.graph(graph):
                outputs.append(run())

        self._graph_peaks[case] = peak_memory(capture, self.settings.device)

        def replay():
            graph.replay()
            return outputs[0]

        return replay

    def peak_mib(self, mode: str, shape: tuple[int, int]) -> float | None:
        """See :func:`peak_memory`; for a CUDA graph, of its capture; None outside of PyTorch."""
        if self.runtime:
            return None
        if self._is_captured and (mode, shape) in self._graph_peaks:
            return self._graph_peaks[mode, shape] / 2**20
        return peak_memory(self.step(mode, shape), self.settings.device) / 2**20

    def difference(self, shape: tuple[int, int]) -> float | None:
        """Largest difference of outputs from those of the modules in float32, relative to the largest output.

        None for detectors, whose outputs depend on which boxes they keep.

        Raises:
            ValueError: It is larger than rounding explains.
        """
        if data_samples(self.model, (self.settings.channels, *shape)) is not None:
            return None
        reference = Candidate(replace(self.spec, forms=('reference',)), replace(self.settings, dtype='float32'))
        expected, found = (tree_leaves(candidate.step('inference', shape)()) for candidate in (reference, self))
        found = [output.float() for output in found]
        largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        exact = self.dtype == 'float32' and not torch.backends.cuda.matmul.allow_tf32 and 'half' not in self.spec.forms
        allowed = TOLERANCES['int8' if 'int8' in self.spec.forms else 'float32' if exact else 'lower']
        if not largest <= allowed:
            raise ValueError(
                f'{self.spec.label}: outputs differ by {largest:.1e} of the largest from those of the modules in '
                f'float32, but rounding explains at most {allowed:.0e}'
            )
        return largest

    def _images(self, shape: tuple[int, int]) -> Tensor:
        return torch.rand(
            self.settings.batch, self.settings.channels, *shape, generator=torch.Generator().manual_seed(0)
        )

    def _function(self, shape: tuple[int, int]) -> Callable:
        """The model as a function of images."""
        if not hasattr(self.model, 'data_preprocessor'):
            return self.call
        return TensorForward(self.call, data_samples(self.model, (self.settings.channels, *shape), self.settings.batch))

    def _start(self, shape: tuple[int, int]) -> Session:
        network = replace(self.spec, label='', forms=tuple(f for f in self.spec.forms if f == 'deploy'))
        key = str((network, self.settings.batch, self.settings.channels, shape))
        if key not in _exported:
            _exported[key] = to_onnx(trace(self._function(shape), self._images(shape)))
        model, start = _exported[key], RUNTIMES[self.runtime]
        if 'half' in self.spec.forms:
            model = deepcopy(model)
            halve(model)
        if 'int8' not in self.spec.forms:
            return start(model.SerializeToString(), self.dtype)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'float32.onnx'
            path.write_bytes(model.SerializeToString())
            made = path.with_name('int8').with_suffix(SUFFIXES[_FORMATS[self.runtime]])
            write_int8(path, made, [self._images(shape).numpy()])
            return start(str(made), self.dtype)

    def _freezing(self):
        if 'freezing' not in self.spec.forms:
            return nullcontext()
        from torch._inductor import config  # takes two seconds

        return config.patch(freezing=True)

    def _precision(self):
        if self.dtype == 'float32' or 'bfloat16' in self.spec.forms:
            return nullcontext()
        return torch.autocast(torch.device(self.settings.device).type, DTYPES[self.dtype])


def _has_gradient(leaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def seconds_of(run: Callable, device: str) -> float:
    """Seconds of a step; on CUDA by events."""
    if device.startswith('cuda'):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def allow_tf32(allowed: bool) -> None:
    """Allow TF32 in float32 products and convolutions on CUDA, or do not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def matmul_gflops(dtype: str, device: str) -> float:
    """GFLOP/s of one large matrix product.

    The largest would take a minute on CPUs without instructions for the dtype: they stop at one of 0.2 seconds.
    """
    for side in _CEILING_SIDES[torch.device(device).type]:
        matrix = torch.rand(side, side, device=device, dtype=DTYPES[dtype])
        seconds = seconds_of(lambda matrix=matrix: matrix @ matrix, device)
        if seconds > _CEILING_SECONDS:
            break
    return 2 * side**3 / seconds / 1e9


def peak_memory(run: Callable, device: str) -> int:
    """Peak bytes of a step beyond those in use before it, as PyTorch's allocators count them."""
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
