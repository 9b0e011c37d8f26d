"""Count what a training iteration launches on a GPU, and predict its time, without a GPU.

Iterations of tools/train.py run on the CPU and compute nothing. Inductor compiles as for an H100; this uses private
names of PyTorch."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch._inductor.config
from mmengine.logging import MMLogger
from torch import Tensor
from torch._inductor import lowering
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmstrip import accelerate
from mmstrip.analysis.complexity import analyze_complexity
from mmstrip.ops import compiled

from ..results import markdown_table
from ..speed.measuring import Candidate, Settings
from . import iterations, speed
from .iterations import BATCH, STRIP
from .page import fill

WAYS, PHASES = ('eager', 'compiled', 'accelerated'), ('network', 'clipping', 'optimizer', 'hooks')
# Bounds of an accelerated Strip-MLP-T: kernels and calls of a block; launches of an iteration, and of the optimizer in
# it; GB of an iteration.
BLOCK, ITERATION, OPTIMIZER, STEP_GB = 60, 1500, 40, 35
# Eager steps on an H200, ms (docs/results/gpu/nvidia-h200.json); Strip-MLP-T had this many operations then (29af4e5).
MEASURED, OLDER = {STRIP: 161.7, 'ConvNeXt-T': 27.8, 'Swin-T': 44.5, 'ResNet-50': 18.2}, {STRIP: 4336}
COPY, PRODUCT = 4.3e12, 532e12  # bytes/s and FLOP/s in bfloat16 of that card
# Beside views, these launch nothing.
FREE = {'_unsafe_view', 'empty', 'empty_strided', 'empty_like', 'new_empty', 'new_empty_strided', 'lift_fresh'}
FREE |= {'resize_', 'unsafe_split', 'unsafe_chunk', 'is_same_size'}
FREE |= {'_record_function_enter_new', '_record_function_exit'}
HOST_READS = ('_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero')
_KERNEL = 'kernel '
_SHAPES = FakeTensorMode()


class Launches(TorchDispatchMode):
    """Counts operations that launch something, and lets them compute nothing.

    Attributes:
        phase: What is counted for now.
        operations: Phase -> name -> number of launches.
        bytes: Read and written.
        reads: Phase -> number of values that the host waits for.
    """

    def __init__(self, phase: str = ''):
        super().__init__()
        self.reset(phase)

    def reset(self, phase: str) -> None:
        self.phase, self.operations = phase, {name: Counter() for name in (phase, *PHASES)}
        self.bytes, self.reads = 0, Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        out = _dry(function, args, kwargs)
        if name in HOST_READS:
            self.reads[self.phase] += args[0].is_floating_point()  # labels are on the host
        elif name not in FREE and not function.is_view:
            read = args if 'out' in kwargs else (args, kwargs)  # what is written into is returned too
            self.note(name, (read, out), _kernels_of(name, args))
        return out

    def note(self, name: str, tensors, launches: int = 1) -> None:
        self.operations.setdefault(self.phase, Counter())[name] += launches
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))

    @property
    def total(self) -> int:
        return sum(counted.total() for counted in self.operations.values())

    def kernels(self, phase: str) -> tuple[int, int]:
        """Kernels of Triton; calls of libraries and of PyTorch's own kernels."""
        kernels = sum(number for name, number in self.operations[phase].items() if name.startswith(_KERNEL))
        return kernels, self.operations[phase].total() - kernels


def _dry(function, args: tuple, kwargs: dict):
    """Tensors of the shapes and layouts that an operation returns, uninitialized."""
    if 'out' in kwargs:
        return kwargs['out']
    if function.__name__.startswith('scatter') and function._schema.is_mutable:  # its indices were never computed
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
    if not name.startswith(('_foreach', '_fused')):
        return 1
    lists = [one for one in args if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
    lists = [one for one in lists if one is lists[0] or (len(one) == len(lists[0]) and one[0].ndim)]
    chunks = sum(math.ceil(tensor.numel() / 65536) for tensor in lists[0])
    return math.ceil(len(lists[0]) / (110, 64, 48, 36, 30)[len(lists) - 1]) + chunks // 320


@contextmanager
def card(counted: Launches) -> Iterator[Launches]:
    """Let Inductor take the CPU for an H100, and count the kernels that it would launch."""
    from .ahead import target

    def run(self, *args, **kwargs) -> None:
        counted.note(_KERNEL + self.fn.__name__, args)

    # Products of half precision that give float32, which GPUs have and CPUs do not.
    product, cpu = torch.ops.aten.mm.dtype, torch.library.Library('aten', 'IMPL')
    cpu.impl('mm.dtype', lambda a, b, dtype: a.new_empty(a.shape[0], b.shape[1], dtype=dtype), 'CPU')
    yes = [
        (module, name)
        for key, module in sys.modules.items()
        if key.startswith('mmstrip.ops.gpu.')
        for name in ('on_card', 'takes_out_dtype')
        if name in vars(module)
    ]
    with ExitStack() as patches, target(90):
        patches.callback(torch._dynamo.reset)
        patches.callback(cpu._destroy)
        patches.enter_context(mock.patch.dict(lowering.lowerings))
        del lowering.lowerings[product]
        lowering.lowerings[product] = lowering.fallback_handler(product, add_to_fallback_set=False)
        settings = dict(cpu_backend='triton', compile_threads=1, force_disable_caches=True)
        patches.enter_context(torch._inductor.config.patch(settings))
        patches.enter_context(mock.patch.multiple(CachingAutotuner, precompile=lambda *args, **kwargs: None, run=run))
        patches.enter_context(mock.patch.object(compiled, 'is_ordinary', lambda: True))  # graphs run though counted
        for module, name in yes:
            patches.enter_context(mock.patch.object(module, name, lambda x: True))
        yield counted


def iteration(name: str, how: str, dry: bool = False, options: dict = {}) -> Launches:
    """What the second iteration launches, of :func:`.iterations.build`; 'network' includes data and loss."""
    options = {'log_level': 'ERROR', 'optim_wrapper.optimizer.fused': True} | options
    options['default_hooks.accelerate.compile'] = True
    runner, counted = iterations.build(name, how, dry, BATCH, 2, options), Launches()

    def count_as(phase: str, owner, method: str) -> None:
        call = getattr(owner, method)

        def run(*args, **kwargs):
            with mock.patch.object(counted, 'phase', phase):
                return call(*args, **kwargs)

        setattr(owner, method, run)

    def around(index: int, run) -> None:
        if index == 0:
            count_as('hooks', runner, 'call_hook')
            count_as('clipping', runner.optim_wrapper, '_clip_grad')
            count_as('optimizer', runner.optim_wrapper.optimizer, 'step')
        counted.reset('network')
        with counted:
            run()

    with card(counted) if how != 'eager' else nullcontext():
        iterations.run(runner, around)
    return counted


def eager_step(name: str) -> Launches:
    """The step that was measured on the H200: forward and backward of a backbone as it is built."""
    step = Candidate(speed.spec(name, False, 'reference'), Settings(('train',), BATCH, dtype='bfloat16'))
    step, counted = step.step('train', (224, 224)), Launches()
    with counted:
        step()
    return counted


def compiled_block(name: str, how: str, stage: int, dry: bool = False) -> Launches:
    """The phases 'forward' and 'backward' of the first block of a stage."""
    model, counted = speed.spec(name, dry, 'reference').build(), Launches()
    block, side = model.stages[stage][0], (64 if dry else 224) // 4 // 2**stage
    channels = (model.embed_dims if name == STRIP else 96) * 2**stage
    if how == 'accelerated':
        accelerate(model, compile=True)
        x = torch.empty(channels, BATCH, side, side, dtype=torch.bfloat16).transpose(0, 1)  # as the step before has it
    else:
        block.compile()
        x = torch.empty(BATCH, channels, side, side).to(memory_format=torch.channels_last)
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
        The slope of the line through zero with the least relative errors; and for each network the relative error of
        this line, and of a line fitted to the others alone.
    """
    ratios = {name: counts[name] / MEASURED[name] for name in counts}

    def slope(*without: str) -> float:
        kept = [ratio for name, ratio in ratios.items() if name not in without]
        return sum(kept) / sum(ratio**2 for ratio in kept)

    return slope(), {name: (slope() * ratio - 1, slope(name) * ratio - 1) for name, ratio in ratios.items()}


def steps_and_iterations() -> Iterator[str]:
    """Markdown: the fit, and whole iterations with their bounds."""
    steps = {name: eager_step(name) for name in MEASURED}
    launch_ms, errors = fit({name: step.total for name, step in steps.items()} | OLDER)
    rows = []
    for name, step in steps.items():
        wrong = (f'{round(100 * error):+} %' for error in errors[name])
        rows.append((name, f'{step.total:,}', f'{step.bytes / 1e9:.1f}', MEASURED[name], *wrong))
    yield f'One launch: {1e3 * launch_ms:.1f} microseconds.'
    yield markdown_table(('eager step', 'operations', 'GB', 'H200, ms', 'error of the fit', 'left out'), rows)
    rows = []
    for name in MEASURED:
        flops = 3 * 2 * BATCH * analyze_complexity(speed.spec(name).build(), (3, 224, 224)).flops
        for way in WAYS[: 3 if name == STRIP else 2]:
            counted = iteration(name, way)
            card_ms = 1e3 * (counted.bytes / COPY + flops / PRODUCT)
            times = f'{card_ms:.0f} to {max(card_ms, launch_ms * counted.total):.0f}'
            optimizer = counted.operations['optimizer'].total()
            rows.append((name, way, f'{counted.total:,}', optimizer, f'{counted.bytes / 1e9:.1f}', times))
    rows.append((STRIP, 'accelerated, at most', f'{ITERATION:,}', OPTIMIZER, STEP_GB, ''))
    yield markdown_table(('iteration', '', 'launches', 'in the optimizer', 'GB', 'predicted, ms'), rows)


def blocks() -> str:
    """A markdown table of compiled blocks."""
    rows = []
    for name, way in ((STRIP, 'accelerated'), (STRIP, 'compiled'), ('ConvNeXt-T', 'compiled')):
        for stage in (0, 2):
            counted = compiled_block(name, way, stage)
            parts = [counted.kernels(phase) for phase in ('forward', 'backward')]
            bound = f' (at most {BLOCK})' if way == 'accelerated' else ''
            rows.append((name, way, stage + 1, *(f'{k} + {c}' for k, c in parts), f'{sum(map(sum, parts))}{bound}'))
    return markdown_table(('block', '', 'stage', 'forward: kernels + calls', 'backward', 'together'), rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--page', type=Path, help='write the tables into this page, such as docs/gpu.md')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if torch.cuda.is_available():
        sys.exit('Error: counting takes the CPU for a GPU, so hide the GPUs: CUDA_VISIBLE_DEVICES= make count')
    MMLogger.get_instance('mmengine', log_level='ERROR')
    parts = [f'Counted with PyTorch {torch.__version__}, {BATCH} images.']
    for part in steps_and_iterations():
        parts.append(part)
        print(f'{part}\n', flush=True)
    print(blocks())  # of use to developers only
    if args.page:
        fill(args.page, 'counted', '\n\n'.join(parts))


if __name__ == '__main__':
    main()
