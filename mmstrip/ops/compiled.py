"""Blocks, and the steps between stages, as graphs that PyTorch compiles: what runs on GPUs.

:func:`.accelerate` gives a network and its blocks the two classes below. A :class:`Network` holds the graphs of one:
per stage, one :class:`Graphs` for all blocks and one for the step before them. Both compute in one of two ways, by the
modules or by the formulas of :mod:`mmstrip.ops.gpu`; on GPUs the faster one is found by timing. Before graphs run, they
are tried on a copy of the network, so that an error costs nothing but speed.
"""

import copy
import hashlib
import time
from collections.abc import Callable
from types import FunctionType
from weakref import WeakKeyDictionary

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models import strip_mlp
from ..models.stock import HOOKS
from ..models.strip_mlp import StripMLP, StripMLPBlock
from . import gpu
from .context import is_ordinary
from .fast import Fast
from .gpu.choices import choose
from .gpu.kernels import analyzing_once
from .tables import given, tables_of

BACKEND = 'inductor'
LIMIT = 64  # graphs per function; PyTorch's own limit is 8


class CompiledStripMLPBlock(Fast, StripMLPBlock):
    reference = StripMLPBlock

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        unit = _unit_of(self)
        if unit is None:
            return super().forward(x, **valid)
        graph, tables = unit.graphs.graph_for(x), None
        if graph is unit.graphs.any_size and 'cgsmm' in self.strip_mixing.branches:
            extent = self.strip_mixing.branches['cgsmm'].extent
            tables = [tables_of(dim, x.shape[dim], side, x.device) for dim, side in zip((2, 3), extent)]
        return graph(self, x, tables, **valid)


class CompiledStripMLP(Fast, StripMLP):
    reference = StripMLP

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if is_ordinary() and self in _networks:
            _networks[self].try_once(self, x)
        return super().forward(x)

    def merge(self, i: int, x: Tensor, earlier: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        unit = _unit_of(self.cross_stage[i])
        if unit is None:
            return super().merge(i, x, earlier)
        x, *earlier = unit.graphs.graph_for(x)(*_step(self, i), x, *earlier)
        return x, earlier if i else []


CLASSES = (CompiledStripMLPBlock, CompiledStripMLP)


def run_modules(block: nn.Module, x: Tensor, tables: list | None = None, **valid: Tensor) -> Tensor:
    """A block; tables of its windows along both axes let it take maps of any size."""
    given.tables = tables
    x = StripMLPBlock.forward(block, x, **valid)
    given.tables = None
    return x


def run_formulas(block: nn.Module, x: Tensor, tables: list | None = None, **valid: Tensor) -> Tensor:
    """The same by formulas."""
    given.tables = tables
    x = gpu.block_forward(block, x, **valid)
    given.tables = None
    return x


def merge_by_modules(merging: nn.Module, cross_stage: nn.ModuleList, x: Tensor, *earlier: Tensor) -> tuple[Tensor, ...]:
    """The step before a stage: its input, then its cross-stage features."""
    x, earlier = strip_mlp.merge_maps(merging, cross_stage, x, earlier)
    return _as_blocks_leave(x), *earlier


def merge_by_formulas(
    merging: nn.Module, cross_stage: nn.ModuleList, x: Tensor, *earlier: Tensor
) -> tuple[Tensor, ...]:
    """The same by formulas."""
    x, earlier = gpu.merge_maps(merging, cross_stage, x, earlier)
    return _as_blocks_leave(x), *earlier


def _as_blocks_leave(x: Tensor) -> Tensor:
    """A map in the memory format of formulas, so that all blocks of a stage share a graph."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if gpu.block_forward else x


# The first way is the reference; without Triton it is the only one.
BLOCK_WAYS = dict(modules=run_modules, formulas=run_formulas)
STEP_WAYS = dict(modules=merge_by_modules, formulas=merge_by_formulas)
if gpu.block_forward is None:
    del BLOCK_WAYS['formulas'], STEP_WAYS['formulas']


class Graphs:
    """A function of modules and maps, compiled for modules that are alike.

    Maps of the shape that comes first have a graph of their own, all others share one of any size. So the shape alone
    decides which graph computes, in a resumed training too.

    Args:
        ways: Functions that compute the same, by name. The last one runs until :meth:`use` says otherwise.

    Attributes:
        all_fixed, all_sizes: Of each way, the graphs for maps of the shape that comes first, and for all others.
        fixed, any_size: Those that run.
    """

    def __init__(self, ways: dict[str, Callable]):
        self.all_fixed, self.all_sizes = (
            {way: _compile(function, dynamic) for way, function in ways.items()} for dynamic in (False, True)
        )
        self.first: dict[bool, torch.Size] = {}  # with gradients, and without
        self.use(list(ways)[-1])

    def use(self, way: str) -> None:
        """Compute in this way from here on."""
        self.fixed, self.any_size = self.all_fixed[way], self.all_sizes[way]

    def is_first(self, x: Tensor) -> bool:
        """Whether a map has the shape that came first."""
        return self.first.setdefault(torch.is_grad_enabled(), x.shape) == x.shape

    def graph_for(self, x: Tensor) -> Callable:
        return self.fixed if self.is_first(x) else self.any_size


def _compile(function: Callable, dynamic: bool) -> Callable:
    # PyTorch counts and limits graphs per code object, so each function has one of its own.
    function = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled = torch.compile(function, backend=BACKEND, dynamic=dynamic)
    config = torch._dynamo.config
    limit = {'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit': LIMIT}

    def run(*arguments, **keywords):
        with config.patch(limit), torch.fx.experimental._config.patch(use_duck_shape=False):
            return compiled(*arguments, **keywords)

    return run


class Network:
    """The graphs of a network, those of the step before each stage and of its blocks, and whether they run."""

    def __init__(self, stages: int):
        self.steps = [Graphs(STEP_WAYS) for _ in range(stages)]
        self.blocks = [Graphs(BLOCK_WAYS) for _ in range(stages)]
        self.group, self.error = None, None  # processes that train together; why no graph runs
        self.tried: set[tuple] = set()

    def try_once(self, network: StripMLP, x: Tensor) -> None:
        """Try all on a copy, before the first images with gradients or without, of the first shape or of others."""
        gradients = torch.is_grad_enabled()
        case = network.training, gradients, self.steps[0].is_first(x)
        if case in self.tried:
            return
        is_first_step = case[:2] == (True, True) and not any(case[:2] == other[:2] for other in self.tried)
        self.tried.add(case)
        before, start = self.error, time.perf_counter()
        with analyzing_once():
            if x.is_cuda and len(BLOCK_WAYS) > 1 and (is_first_step or len(self.tried) == 1):
                self.choose_ways(network, x, self.group if is_first_step else None)
            if self.error is None:
                self.error = _try(network, x)
        # All processes take their first step together; what else they run, and on which sizes, may differ.
        if self.group is not None and is_first_step and _any(self.error is not None, x.device, self.group):
            self.error = self.error or 'it failed in another process'
        if self.error is None:
            done = 'forward and backward' if gradients else 'forward'
            print_log(f'Strip-MLP: {done} compiled in {time.perf_counter() - start:.0f} s', 'current')
        elif before is None:
            print_log(f'Strip-MLP: the reference runs, as compiling failed: {self.error}', 'current')

    def choose_ways(self, network: StripMLP, images: Tensor, group) -> None:
        """Let each stage compute as is fastest on this card; the first process of a group finds that out for all."""
        graphs = [*self.steps, *self.blocks]
        ways = [next(iter(one.all_fixed)) for one in graphs]  # the reference
        if group is None or torch.distributed.get_rank(group) == 0:
            try:
                ways = self.fastest_ways(network, images)
            except Exception as error:  # the others wait for an answer
                print_log(f'Strip-MLP: nothing could be timed, {ways[0]} run: {type(error).__name__}', 'current')
        if group is not None:
            torch.distributed.broadcast_object_list(ways, torch.distributed.get_global_rank(group, 0), group)
        for one, way in zip(graphs, ways):
            one.use(way)

    def fastest_ways(self, network: StripMLP, images: Tensor) -> list[str]:
        """What :func:`.choose` finds for the step before each stage, then for each stage's first block.

        Neither the network nor random numbers change.
        """
        steps, blocks = [], []
        with _fork_random(images):
            x, earlier = torch.randn_like(images, requires_grad=images.requires_grad), []
            for i, stage in enumerate(network.stages):
                step = tuple(map(_copy, _step(network, i)))
                steps.append(choose(_name('step', *step), step, [x, *earlier], self.steps[i].all_fixed))
                x, *earlier = merge_by_modules(*step, x, *earlier)
                earlier = earlier if i else []
                block = _copy(stage[0])
                if block.training:  # nothing is drawn, so that ways can be compared
                    block.drop_path = type(block.drop_path)(0.0)
                if gpu.has_formula(block, x):
                    blocks.append(choose(_name('block', block), (block,), [x], self.blocks[i].all_fixed))
                else:  # both ways are the modules
                    blocks.append('modules')
        return steps + blocks


class Unit:
    """What is compiled as one: a block, or the step before a stage.

    It shares its graphs with those that are alike. ``modules`` are inside of it: a graph would not see their hooks.
    """

    def __init__(self, graphs: Graphs, network: Network, modules: list[nn.Module]):
        self.graphs, self.network = graphs, network
        self.hooks = [vars(module)[name] for module in modules for name in HOOKS]

    def may_run(self) -> bool:
        return self.network.error is None and not any(self.hooks)


_networks: WeakKeyDictionary[nn.Module, Network] = WeakKeyDictionary()
_units: WeakKeyDictionary[nn.Module, Unit] = WeakKeyDictionary()


def prepare(model: nn.Module) -> str:
    """Let the networks in a model compile in their next forward pass, and return what the log says.

    Those that have compiled keep their graphs.
    """
    blocks, slow = 0, []
    for prefix, network in model.named_modules():
        if isinstance(network, CompiledStripMLP):
            graphs = _networks[network] = _networks.get(network) or Network(len(network.stages))
            if graphs.error is not None:
                return f'the reference runs, as compiling failed: {graphs.error}'
            for i, stage in enumerate(network.stages):
                merging, cross_stage = _step(network, i)
                _units[cross_stage] = Unit(graphs.steps[i], graphs, [merging, *cross_stage.modules()])
                for j, block in enumerate(stage):
                    _units[block] = unit = Unit(graphs.blocks[i], graphs, list(block.modules())[1:])
                    blocks += 1
                    if not unit.may_run() or type(block) is not CompiledStripMLPBlock or 'forward' in vars(block):
                        slow.append(f'{prefix}.stages.{i}.{j}'.lstrip('.'))
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            for network in wrapper.modules():
                if network in _networks:
                    _networks[network].group = wrapper.process_group
    said = f'{blocks - len(slow)} of {blocks} blocks, and the steps between stages, are compiled in the first forward'
    return said + (f'; the reference elsewhere: {slow[0]} is wrapped or hooked' if slow else '')


def _step(network: StripMLP, i: int) -> tuple[nn.Module, nn.ModuleList]:
    """The modules of the step before a stage."""
    return network.merging[i - 1] if i else network.patch_embed, network.cross_stage[i]


def _unit_of(module: nn.Module) -> Unit | None:
    unit = _units.get(module) if is_ordinary() else None
    return unit if unit is not None and unit.may_run() else None


def _try(network: StripMLP, x: Tensor) -> str | None:
    """The error that a copy's forward or backward ends with, in a line."""
    try:
        _run_copy(network, x)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return ' '.join([f'{type(error).__name__}:', *lines[:2]])  # PyTorch's own may come in the second
    return None


def _run_copy(network: StripMLP, x: Tensor) -> None:
    """Forward, and backward where gradients are required; neither the network nor random numbers change."""
    copied = _copy(network)
    for module, other in zip(network.modules(), copied.modules()):
        if module in _units:
            _units[other] = Unit(_units[module].graphs, _units[module].network, [])
    with _fork_random(x):
        maps = [y for y in copied(x.detach().requires_grad_(x.requires_grad)) if y.requires_grad]
        if maps:
            torch.autograd.backward(maps, [torch.ones_like(y) for y in maps])


def _copy(module: nn.Module) -> nn.Module:
    """A copy without hooks."""
    with torch.inference_mode(False):
        copied = copy.deepcopy(module)
    for inner in copied.modules():
        for name in HOOKS:
            vars(inner)[name].clear()
    return copied


def _fork_random(x: Tensor):
    """Restore the random state of the CPU and of a map's device afterwards."""
    return torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])


def _name(kind: str, *modules: nn.Module) -> str:
    """A name of modules that are alike."""
    return f'{kind} {hashlib.sha256(repr(modules).encode()).hexdigest()[:12]}'


def _any(value: bool, device: torch.device, group) -> bool:
    """Whether a value is true in any process."""
    found = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return bool(found)
