"""Accelerated models for the tests of behaviours, and the results of float64 copies that they are compared with."""

import copy
import functools
from collections.abc import Callable, Iterator

import numpy
import torch
from torch import Tensor, nn

from helpers import accelerator, randomise, small_backbone
from mmstrip.models import StripMLP
from mmstrip.models.stock import class_of

MODES = ('train', 'eval', 'deploy')
TOLERANCE = 1e-4  # of the largest value

# Three stages of 16, 32 and 64 channels with cross-stage features, and images that fit: milliseconds a forward.
FAST = dict(img_size=32, out_indices=(0, 1, 2), drop_path_rate=0.0)
BLOCK = 'stages.1.0'
# Boxes of a block, by the names that they have in it.
BOXES = {
    'row': 'strip_mixing.branches.cgsmm.row',
    'column': 'strip_mixing.branches.cgsmm.column',
    'position_row': 'strip_mixing.branches.cgsmm.position_row',
    'position_column': 'strip_mixing.branches.cgsmm.position_column',
    'cgsmm': 'strip_mixing.branches.cgsmm',
    'lsmm': 'strip_mixing.branches.lsmm',
    'strip_mixing': 'strip_mixing',
    'grn': 'channel_mixing.grn',
    'channel_mixing': 'channel_mixing',
}
# Convolutions that are linear layers over the channels, and linear layers.
POINTWISE = (
    'strip_mixing.project.0',
    'strip_mixing.branches.cgsmm.fuse_row',
    'strip_mixing.branches.cgsmm.fuse_column',
    'strip_mixing.branches.lsmm.reweight.0',
    'strip_mixing.branches.lsmm.reweight.2',
    'strip_mixing.fuse',
    'channel_mixing.fc1',
    'channel_mixing.fc2',
)


def backbone(mode: str = 'eval', seed: int = 0, **arguments) -> StripMLP:
    """A backbone of random weights that was accelerated, in training mode, in evaluation mode or in the deploy form."""
    if arguments:
        return _build(mode, seed, **arguments)
    return copy.deepcopy(_template(mode, seed))


def _build(mode: str, seed: int, **arguments) -> StripMLP:
    torch.manual_seed(seed)
    model = randomise(small_backbone(**{**FAST, **arguments}), seed)
    accelerator.change_classes(model)
    if mode == 'deploy':
        model.eval().switch_to_deploy()
    return model.train(mode == 'train')


@functools.cache
def _template(mode: str, seed: int) -> StripMLP:
    with torch.device('cpu'), torch.inference_mode(False), torch.enable_grad():
        return _build(mode, seed)


class SecondStage(nn.Module):
    """The second stage of a backbone by itself, under the names that it has there; :meth:`input` fits."""

    def __init__(self, mode: str = 'eval'):
        super().__init__()
        self.stages = nn.ModuleDict({'1': backbone(mode).stages[1]})
        self.train(mode == 'train')

    def forward(self, x: Tensor) -> Tensor:
        return self.stages['1'](x)

    @staticmethod
    def input(**seed) -> Tensor:
        return images(2, 32, 4, 4, **seed)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (2, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


def float64_copy(module: nn.Module) -> nn.Module:
    """In float64, on the reference."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        part.__class__ = class_of(part)
    return module


def module_of_block(model: nn.Module, name: str) -> nn.Module:
    """The module of that name in the second stage's block."""
    return model.get_submodule(f'{BLOCK}.{name}' if name else BLOCK)


def replace_in_block(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in place of the one of that name in the second stage's block."""
    parent, _, last = (f'{BLOCK}.{name}' if name else BLOCK).rpartition('.')
    setattr(model.get_submodule(parent), last, module)
    return model


def loss_of(maps) -> Tensor:
    """A sum of maps with fixed random weights, as different for all values."""
    maps = (maps,) if isinstance(maps, Tensor) else maps
    # Drawn by numpy, as functorch lets PyTorch draw nothing within vmap.
    weights = (numpy.random.default_rng(7).standard_normal(feature.shape) for feature in maps)
    return sum((feature * torch.from_numpy(weight).to(feature.dtype)).sum() for feature, weight in zip(maps, weights))


def outputs_of(model: Callable, x: Tensor, gradients: bool | None = None) -> dict[str, Tensor]:
    """Maps by number; in training mode, or if gradients are asked for, also those of images and parameters by name."""
    if gradients is None:
        gradients = model.training
    if not gradients:
        with torch.no_grad():
            return _numbered(model(x))
    model.zero_grad()
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        maps = model(x)
        loss_of(maps).backward()
    grads = {f'grad of {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**_numbered(maps), 'grad of x': x.grad, **grads}


def _numbered(maps) -> dict[str, Tensor]:
    maps = (maps,) if isinstance(maps, Tensor) else maps
    return {f'map {i}': feature.detach() for i, feature in enumerate(maps)}


def float64_outputs(model: nn.Module, x: Tensor, gradients: bool | None = None) -> dict[str, Tensor]:
    """What :func:`run` gives in float64, of a copy."""
    return outputs_of(float64_copy(model), x.double(), gradients)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Each within the tolerance of its largest value, small gradients within that of a hundredth of the largest one."""
    assert got.keys() == expected.keys(), set(got) ^ set(expected)
    largest = max((value.abs().max().item() for name, value in expected.items() if name.startswith('grad')), default=0)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        floor = 0.01 * largest if name.startswith('grad') else 0
        error = (got[name].double() - value.double()).abs().max().item()
        scale = max(value.abs().max().item(), floor)
        assert error <= tolerance * scale, f'{name}: relative error {error / scale:.2g}'


def assert_matches_float64(
    model: nn.Module, x: Tensor, gradients: bool | None = None, tolerance: float = TOLERANCE
) -> dict:
    """A model gives what its float64 copy gives, which is returned."""
    expected = float64_outputs(model, x, gradients)
    assert_close(outputs_of(model, x, gradients), expected, tolerance)
    return expected


def assert_changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """At least one map is clearly another one: what was asked for is not without effect."""
    differences = (
        (one[name].double() - other[name].double()).abs().max() / other[name].abs().max()
        for name in other
        if name.startswith('map')
    )
    assert max(differences) > 2 * TOLERANCE, 'the change is without effect'


@functools.cache
def unchanged_outputs(mode: str, part: str = 'model') -> dict[str, Tensor]:
    """What an unchanged backbone, or its second stage, gives in float64."""
    return (
        float64_outputs(backbone(mode), images())
        if part == 'model'
        else float64_outputs(SecondStage(mode), SecondStage.input())
    )


def called_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a forward calls, by name; lists and dicts of modules hold others only."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield name, module
