"""What a training iteration launches on a GPU, with its bytes and products, and a prediction of its time, without one.

Iterations of tools/train.py run on the CPU and compute nothing: shapes alone pass through. What is compiled, Inductor
generates and schedules as for an H100; this leans on private names of PyTorch."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from mmengine.logging import MMLogger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

from mmstrip import accelerate

from ..results import markdown_table
from ..speed.measuring import Candidate, Settings
from . import Setting, iterations, speed
from .iterations import STRIP
from .page import fill

BATCH = 64
WAYS, PHASES = ('eager', 'compiled', 'accelerated'), ('network', 'clipping', 'optimizer', 'hooks')
# Of an accelerated Strip-MLP-T at most: kernels and calls of a block, launches of an iteration and of the optimizer in
# it, GB of an iteration.
BLOCK, ITERATION, OPTIMIZER, STEP_GB = 60, 1500, 40, 35
# Eager steps of 64 images in bfloat16 on an H200, ms (docs/results/gpu/nvidia-h200.json), and the operations of the one
# whose code has changed since (of commit 29af4e5, counted likewise).
MEASURED = {STRIP: 161.7, 'ConvNeXt-T': 27.8, 'Swin-T': 44.5, 'ResNet-50': 18.2}
OLDER = {STRIP: 4336}
COPY, PRODUCT = 4.3e12, 532e12  # bytes/s and FLOP/s in bfloat16 of that card
# What launches nothing, beside views.
FREE = [
    '_unsafe_view',
    'empty',
    'empty_strided',
    'empty_like',
    'new_empty',
    'new_empty_strided',
    'lift_fresh',
    'resize_',
]
FREE += ['unsafe_split', 'unsafe_chunk', 'is_same_size', '_record_function_enter_new', '_record_function_exit']
HOST_READS = ('_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero')
_KERNEL = 'kernel '
_SHAPES = FakeTensorMode()


class Launches(TorchDispatchMode):
    """Counts operations that launch something, and lets them compute nothing.

    Attributes:
        phase: What is counted for now.
        operations: Phase -> name -> number of launches.
        bytes, flops, reads: Read and written; of products; values that the host waits for; phase -> number.
    """

    def __init__(self, phase: str = ''):
        super().__init__()
        self.reset(phase)

    def reset(self, phase: str) -> None:
        self.phase, self.operations = phase, {name: Counter() for name in (phase, *PHASES)}
        self.bytes, self.flops, self.reads = Counter(), Counter(), Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet, kwargs = function.overloadpacket, kwargs or {}
        out = _dry(function, args, kwargs)
        if packet.__name__ in HOST_READS:
            self.reads[self.phase] += args[0].is_floating_point()  # labels are on the host
        elif packet.__name__ not in FREE and not function.is_view:
            self.note(packet.__name__, (args, kwargs, out), _kernels_of(packet.__name__, args))
            if packet is torch.ops.aten.convolution_backward:  # PyTorch's own formula ignores groups
                shapes = [args[i].shape for i in (1, 2, 0)]
                self.flops[self.phase] += sum(args[-1][:2]) * conv_flop_count(*shapes)
            elif packet in flop_registry:
                self.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def note(self, name: str, tensors, launches: int = 1) -> None:
        self.operations.setdefault(self.phase, Counter())[name] += launches
        self.bytes[self.phase] += sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))

    @property
    def total(self) -> int:
        return sum(counted.total() for counted in self.operations.values())

    def kernels(self, phase: str) -> tuple[int, int]:
        """Kernels of Triton, and calls of libraries and PyTorch's own kernels."""
        kernels = sum(number for name, number in self.operations[phase].items() if name.startswith(_KERNEL))
        return kernels, self.operations[phase].total() - kernels


def _dry(function, args: tuple, kwargs: dict):
    """What an operation gives, of the right shapes and layouts, with whatever is in the memory."""
    if 'out' in kwargs:
        return kwargs['out']
    if function.__name__.startswith('scatter') and function._schema.is_mutable:  # to places that were never computed
        return args[0]
    floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves((args, kwargs)))
    is_read = function.overloadpacket.__name__ in HOST_READS
    if not floats or is_read or function.is_view or function._schema.is_mutable:
        return function(*args, **kwargs)
    with _SHAPES:
        args, kwargs = tree_map_only(Tensor, _like, (args, kwargs))
        out = function(*args, **kwargs)
    return tree_map_only(Tensor, _like, out)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _kernels_of(name: str, args: tuple) -> int:
    """Kernels of an operation at most: those over lists of tensors take several (ATen/native/cuda/MultiTensorApply)."""
    lists = [one for one in args if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
    if not name.startswith(('_foreach', '_fused')):
        return 1
    lists = [one for one in lists if len(one) == len(lists[0]) and (one[0].ndim or len(lists) == 1)]
    chunks = sum(math.ceil(tensor.numel() / 65536) for tensor in lists[0])
    return math.ceil(len(lists[0]) / (110, 64, 48, 36, 30)[len(lists) - 1]) + chunks // 320


@contextmanager
def card(counted: Launches) -> Iterator[None]:
    """Let Inductor take the CPU for an H100, and count the kernels that it would launch."""
    import torch._inductor.config as config
    from torch._inductor import lowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import driver

    from mmstrip.ops import compiled

    ours = [module for name, module in sys.modules.items() if name.startswith('mmstrip.ops.gpu.')]
    target, make_backend = GPUTarget('cuda', 90, 32), compiler.make_backend
    no_card = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device('cpu'),
        get_device_interface=lambda: torch.cpu,
        get_current_stream=lambda device=None: 0,
    )

    def run(self, *args, **kwargs) -> None:
        counted.note(_KERNEL + self.fn.__name__, args)

    # Products of half precision that give float32, which GPUs have and CPUs do not.
    product, cpu = torch.ops.aten.mm.dtype, torch.library.Library('aten', 'IMPL')
    cpu.impl('mm.dtype', lambda a, b, dtype: a.new_empty(a.shape[0], b.shape[1], dtype=dtype), 'CPU')
    with ExitStack() as patches:
        patches.callback(torch._dynamo.reset)
        patches.callback(cpu._destroy)
        patches.enter_context(mock.patch.dict(lowering.lowerings))
        del lowering.lowerings[product]
        lowering.lowerings[product] = lowering.fallback_handler(product, add_to_fallback_set=False)
        patches.enter_context(config.patch(cpu_backend='triton', compile_threads=1, force_disable_caches=True))
        for owner, attribute, value in (
            (driver, '_active', no_card),
            (compiler, 'make_backend', lambda _: make_backend(target)),
            (CachingAutotuner, 'precompile', lambda *args, **kwargs: None),
            (CachingAutotuner, 'run', run),
            (compiled, 'is_ordinary', lambda: True),  # its graphs run though they are counted
            *((module, 'on_card', lambda x: True) for module in ours if 'on_card' in vars(module)),
            *((module, 'takes_out_dtype', lambda x: True) for module in ours if 'takes_out_dtype' in vars(module)),
        ):
            patches.enter_context(mock.patch.object(owner, attribute, value))
        yield


def iteration(name: str, how: str, batch: int = BATCH, tiny: bool = False, options: dict = {}) -> Launches:
    """What the second iteration launches, of :func:`.iterations.build`.

    Its phases are 'network', with loss and data, 'clipping', 'optimizer' and 'hooks', with logs and EMA.
    """
    on_cuda = {'optim_wrapper.optimizer.fused': True, 'default_hooks.accelerate.compile': True}
    counted = Launches()
    runner = iterations.build(
        name, how, Setting('', 'cpu', tiny), batch, 2, options={'log_level': 'ERROR'} | on_cuda | options
    )

    def around(index: int, run) -> None:
        if index == 0:
            _count_as('hooks', counted, runner, 'call_hook')
            _count_as('clipping', counted, runner.optim_wrapper, '_clip_grad')
            _count_as('optimizer', counted, runner.optim_wrapper.optimizer, 'step')
        counted.reset('network')
        with counted:
            run()

    with card(counted) if how != 'eager' else nullcontext():
        iterations.run(runner, around)
    return counted


def _count_as(phase: str, counted: Launches, owner, method: str) -> None:
    call = getattr(owner, method)

    def run(*args, **kwargs):
        with mock.patch.object(counted, 'phase', phase):
            return call(*args, **kwargs)

    setattr(owner, method, run)


def eager_step(name: str) -> Launches:
    """The step that was measured on the H200: forward and backward of a backbone as it is built."""
    spec = speed.spec(name, Setting('', 'cpu'), 'reference')
    step = Candidate(spec, Settings(('train',), BATCH, dtype='bfloat16')).step('train', (224, 224))
    with Launches() as counted:
        step()
    return counted


def compiled_block(name: str, how: str, stage: int) -> Launches:
    """The phases 'forward' and 'backward' of the first block of a stage."""
    model = speed.spec(name, Setting('', 'cpu'), 'reference').build()
    block, counted = model.stages[stage][0], Launches()
    if how == 'accelerated':
        accelerate(model, compile=True)
    else:
        block.compile()
    channels, side = (model.embed_dims if name == STRIP else 96) * 2**stage, 56 // 2**stage
    x = torch.empty(BATCH, channels, side, side).to(memory_format=torch.channels_last)
    if how == 'accelerated':  # as the step before it leaves maps
        x = torch.empty(channels, BATCH, side, side, dtype=torch.bfloat16).transpose(0, 1)
    with card(counted):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            counted.reset('forward')
            with counted, torch.autocast('cpu', dtype=torch.bfloat16):
                y = block(x.detach().requires_grad_())
            gradient, counted.phase = torch.empty_like(y), 'backward'
            with counted:
                y.backward(gradient)
    return counted


def fit(counts: dict[str, int]) -> tuple[float, dict[str, tuple[float, float]]]:
    """Milliseconds of a launch in the eager steps of :data:`MEASURED`, all of which waited for their launches.

    Returns:
        The slope of the line through zero with the least relative errors; and of each network the relative error of
        this line, and of one that is fitted to the others alone.
    """
    ratios = {name: counts[name] / MEASURED[name] for name in counts}

    def slope(*without: str) -> float:
        kept = [ratio for name, ratio in ratios.items() if name not in without]
        return sum(kept) / sum(ratio**2 for ratio in kept)

    return slope(), {name: (slope() * ratio - 1, slope(name) * ratio - 1) for name, ratio in ratios.items()}


def report(names: Sequence[str]) -> Iterator[str]:
    """Markdown: the fit, compiled blocks, and whole iterations with their bounds."""
    steps = {name: eager_step(name) for name in MEASURED}
    cost, errors = fit({name: step.total for name, step in steps.items()} | OLDER)
    rows = [
        (name, f'{step.total:,}', *_size(step), MEASURED[name], *(f'{100 * one:+.0f} %' for one in errors[name]))
        for name, step in steps.items()
    ]
    yield markdown_table(('eager step', 'operations', 'GB', 'TFLOP', 'H200, ms', 'error of the fit', 'left out'), rows)
    yield f'One launch: {1e3 * cost:.1f} microseconds.'
    rows = []
    for name, way in ((STRIP, 'accelerated'), (STRIP, 'compiled'), ('ConvNeXt-T', 'compiled')):
        for stage in (0, 2) if name in names else ():
            counted = compiled_block(name, way, stage)
            parts = [counted.kernels(phase) for phase in ('forward', 'backward')]
            bound = f' (at most {BLOCK})' if way == 'accelerated' else ''
            rows.append((name, way, stage + 1, *(f'{k} + {c}' for k, c in parts), f'{sum(map(sum, parts))}{bound}'))
    yield markdown_table(('block', '', 'stage', 'forward: kernels + calls', 'backward', 'together'), rows)
    rows = []
    for name, way in ((name, way) for name in names for way in WAYS if way != 'accelerated' or name == STRIP):
        counted = iteration(name, way)
        card_ms = 1e3 * (sum(counted.bytes.values()) / COPY + sum(counted.flops.values()) / PRODUCT)
        phases = [counted.operations[phase].total() for phase in PHASES]
        times = f'{card_ms:.0f} to {max(card_ms, cost * counted.total):.0f}'
        rows.append((name, way, *phases, f'{counted.total:,}', *_size(counted), times))
        if way == 'accelerated':
            rows.append(('', 'at most', '', '', OPTIMIZER, '', f'{ITERATION:,}', STEP_GB, '', ''))
    yield markdown_table(('iteration', '', *PHASES, 'launches', 'GB', 'TFLOP', 'predicted, ms'), rows)


def _size(counted: Launches) -> tuple[str, str]:
    return f'{sum(counted.bytes.values()) / 1e9:.1f}', f'{sum(counted.flops.values()) / 1e12:.2f}'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--networks', nargs='+', choices=MEASURED, default=list(MEASURED), help='default: all')
    parser.add_argument('--page', type=Path, help='put the tables into this page, such as docs/gpu.md')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    MMLogger.get_instance('mmengine', log_level='ERROR')
    parts = [f'Counted with PyTorch {torch.__version__}, 64 images:']
    for part in report(args.networks):
        parts.append(part)
        print(f'{part}\n', flush=True)
    if args.page:
        fill(args.page, 'counted', '\n\n'.join(parts))


if __name__ == '__main__':
    main()
