"""Blocks, and the steps between stages, as graphs that PyTorch compiles: what runs on GPUs."""

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
from ..models.strip_mlp import StripMLP, StripMLPBlock
from . import gpu
from .context import is_ordinary
from .fast import Fast
from .gpu.choices import choose
from .tables import given, tables_of

BACKEND = 'inductor'
LIMIT = 64  # graphs of a stage's blocks; PyTorch's own limit is 8
# Formulas for graphs; without Triton, the modules' own.
merge_maps = gpu.merge_maps or strip_mlp.merge_maps
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


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
        merging = self.merging[i - 1] if i else self.patch_embed
        x, earlier = unit.graphs.graph_for(x)(merging, self.cross_stage[i], x, earlier)
        return x, earlier if i else []


CLASSES = (CompiledStripMLPBlock, CompiledStripMLP)


def run_modules(block: nn.Module, x: Tensor, tables: list | None = None, **valid: Tensor) -> Tensor:
    """A block; tables of its windows along both axes let it take maps of any size."""
    given.tables = tables
    x = StripMLPBlock.forward(block, x, **valid)
    given.tables = None
    return x


def run_formulas(block: nn.Module, x: Tensor, tables: list | None = None, **valid: Tensor) -> Tensor:
    """The same by formulas for graphs."""
    given.tables = tables
    x = gpu.block_forward(block, x, **valid)
    given.tables = None
    return x


# The first one is the reference.
WAYS = dict(modules=run_modules, formulas=run_formulas) if gpu.block_forward else dict(modules=run_modules)


def run_merging(merging: nn.Module, cross_stage: nn.ModuleList, x: Tensor, earlier: list[Tensor]):
    """:func:`.merge_maps`, in the memory format of blocks, so that all of a stage have one graph."""
    x, earlier = merge_maps(merging, cross_stage, x, earlier)
    return x.transpose(0, 1).contiguous().transpose(0, 1) if gpu.block_forward else x, earlier


class Graphs:
    """A function of modules and maps, compiled for modules that are alike.

    Maps of the shape that comes first have a graph of their own, all others share one of any size. So the shape alone
    decides which graph computes, in a resumed training too.

    Attributes:
        fixed: For maps of the shape that comes first.
        any_size: For all others.
    """

    def __init__(self, function: Callable):
        self.use(function)
        self.first: dict[bool, torch.Size] = {}  # with gradients, and without

    def use(self, function: Callable) -> None:
        """Compile another function from here on."""
        self.fixed, self.any_size = _compile(function, dynamic=False), _compile(function, dynamic=True)

    def graph_for(self, x: Tensor) -> Callable:
        """The function for maps of a shape."""
        return self.fixed if self.first.setdefault(torch.is_grad_enabled(), x.shape) == x.shape else self.any_size


def _compile(function: Callable, dynamic: bool) -> Callable:
    # PyTorch counts and limits graphs by code object, so this is one of its own.
    function = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled = torch.compile(function, backend=BACKEND, dynamic=dynamic)
    config = torch._dynamo.config
    limit = {'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit': LIMIT}

    def run(*arguments, **keywords):
        with config.patch(limit), torch.fx.experimental._config.patch(use_duck_shape=False):
            return compiled(*arguments, **keywords)

    return run


class Network:
    """The graphs of a network, and whether they could be made.

    Attributes:
        group: Of processes that train the network together, or None.
        error: Why its graphs do not run, or None.
    """

    def __init__(self, stages: int):
        self.ways = [list(WAYS)[-1]] * stages
        self.blocks = [Graphs(WAYS[way]) for way in self.ways]
        self.merging = [Graphs(run_merging) for _ in range(stages)]
        self.group, self.error = None, None
        self.tried: set[tuple] = set()
        self.first: dict[bool, torch.Size] = {}

    def try_once(self, network: StripMLP, x: Tensor) -> None:
        """Try all on a copy, before the first images with gradients or without, of the first shape or of others."""
        gradients = torch.is_grad_enabled()
        case = network.training, gradients, self.first.setdefault(gradients, x.shape) == x.shape
        if case in self.tried:
            return
        is_first_step = case[:2] == (True, True) and not any(case[:2] == other[:2] for other in self.tried)
        self.tried.add(case)
        before, start = self.error, time.perf_counter()
        if x.is_cuda and len(WAYS) > 1 and (is_first_step or len(self.tried) == 1):
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

    def choose_ways(self, network: StripMLP, x: Tensor, group) -> None:
        """Let each stage compute as is fastest on this card, which the first process of a group finds for all."""
        ways = [None] * len(self.blocks)
        if group is None or torch.distributed.get_rank(group) == 0:
            ways = _fastest_ways(network, x)
        if group is not None:
            torch.distributed.broadcast_object_list(ways, torch.distributed.get_global_rank(group, 0), group)
        for graphs, way, other in zip(self.blocks, ways, self.ways):
            if way != other:
                graphs.use(WAYS[way])
        self.ways = ways


class Unit:
    """What is compiled as one: a block, or a step between stages.

    Args:
        graphs: Of it and of those that are alike.
        network: That it is part of.
        modules: Those whose hooks a graph would not see.
    """

    def __init__(self, graphs: Graphs, network: Network, modules: list[nn.Module]):
        self.graphs, self.network = graphs, network
        self.hooks = [vars(module)[name] for module in modules for name in HOOKS]

    def may_run(self) -> bool:
        return self.network.error is None and not any(self.hooks)


_networks: WeakKeyDictionary[nn.Module, Network] = WeakKeyDictionary()
_units: WeakKeyDictionary[nn.Module, Unit] = WeakKeyDictionary()


def prepare(model: nn.Module) -> str:
    """Let the networks in a model compile in their next forward pass; those that have, keep their graphs.

    Returns:
        What is to be said.
    """
    blocks, slow = 0, []
    for prefix, network in model.named_modules():
        if isinstance(network, CompiledStripMLP):
            graphs = _networks.get(network) or Network(len(network.stages))
            _networks[network] = graphs
            if graphs.error is not None:
                return f'the reference runs, as compiling failed: {graphs.error}'
            for i, stage in enumerate(network.stages):
                merging = network.merging[i - 1] if i else network.patch_embed
                cross_stage = network.cross_stage[i]
                _units[cross_stage] = Unit(graphs.merging[i], graphs, [merging, *cross_stage.modules()])
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
    said = f'{blocks - len(slow)} of {blocks} blocks, and what stands between stages, are compiled in the first forward'
    return said + (f'; the reference elsewhere: {slow[0]} is wrapped or hooked' if slow else '')


def forget(module: nn.Module) -> None:
    """Let go of the graphs of a network."""
    _networks.pop(module, None)


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
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
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


def _fastest_ways(network: StripMLP, x: Tensor) -> list[str]:
    """Of each stage, the way that :func:`.choose` finds with its first block; neither it nor random numbers change."""
    ways, size = [], [side // 2 for side in x.shape[2:]]
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    compiled = {name: _compile(function, dynamic=False) for name, function in WAYS.items()}
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for i, stage in enumerate(network.stages):
            size = [side // 2 for side in size]
            block = _copy(stage[0])
            block.drop_path = type(block.drop_path)(0.0)  # so that ways draw nothing, and can be compared
            channels = network.embed_dims * 2**i
            sample = torch.randn(channels, len(x), *size, device=x.device, dtype=dtype).transpose(0, 1)
            kind = hashlib.sha256(repr(block).encode()).hexdigest()[:12]
            ways.append(choose(f'block {kind}', block, sample, compiled))
    return ways


def _any(value: bool, device: torch.device, group) -> bool:
    """Whether a value is true in any process."""
    found = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return bool(found)
