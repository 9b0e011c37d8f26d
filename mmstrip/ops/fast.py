"""Base class of faster implementations of modules, and the conditions under which they run."""

import copy
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..models.stock import PLAIN, class_of, is_untouched, own_tensors, replaced_methods
from .context import are_plain, is_ordinary, parameter_types

CONTAINERS = (nn.Sequential, nn.ModuleDict)
Types = tuple[torch.dtype, ...]


class Fast:
    """Mixin: ``class FastX(Fast, X)`` computes the same as module class X in another way.

    :func:`.accelerate` only changes a module's class, so its layers, tensors and hooks stay. ``forward`` asks
    :meth:`may_run` and falls back to that of X.

    Attributes:
        reference (type): X.
        layers (dict): The layers that the implementation reads: name to a :class:`.Stock`, several alternatives, or a
            dict of the same for a container. Layers that are not listed must be called as modules.
    """

    reference: type
    layers: dict = {}

    def may_run(self, x: Tensor) -> bool:
        """Whether the implementation gives the same result as the reference on a map (N, C, H, W)."""
        types = self.parameter_types(x)
        if not types:
            return False
        snapshot = _snapshots.get(self)
        if snapshot is None or not snapshot.is_current(self, types):
            snapshot = _snapshots[self] = Snapshot(self, types)
        return snapshot.is_stock

    @staticmethod
    def parameter_types(x: Tensor) -> Types:
        """Parameter dtypes that the implementation supports for a map right now; empty if it cannot run."""
        return parameter_types(x.dtype) if is_ordinary() and are_plain(x) else ()

    @classmethod
    def find_mismatch(cls, module: nn.Module, types: Types) -> str | None:
        """Name of the first layer that differs from a newly built X; '' for the module itself, None if all agree."""
        # Wrapping a module's forward, like checkpointing does, does not matter.
        methods = replaced_methods(module) - {'forward', '_compiled_call_impl'}
        if class_of(module) is not cls.reference or methods or not _are_of(types, module):
            return ''
        return _find_mismatch(module, cls.layers, types)

    def __reduce_ex__(self, protocol):
        """Pickle as the reference class."""
        return object.__new__, (self.reference,), self.__getstate__()

    def __deepcopy__(self, memo: dict):
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = {name: value for name, value in vars(self).items() if name != '_compiled_call_impl'}
        vars(copied).update(copy.deepcopy(state, memo))
        return copied


class Snapshot:
    """State of a module of a :class:`Fast` class and of the layers that it reads, and whether they were stock."""

    def __init__(self, module: nn.Module, types: Types):
        self.types, layers = types, self.layers_of(module)
        self.kind, self.state = type(module), _state(module)  # not the module itself, so that it can be freed
        self.states = [(layer, type(layer), _state(layer)) for layer in layers]
        tensors = (tensor for layer in (module, *layers) for tensor in own_tensors(layer).values())
        self.tensors = [(tensor, type(tensor), tensor.dtype, tensor.is_cpu) for tensor in tensors]
        self.is_stock = module.find_mismatch(module, types) is None

    def layers_of(self, module: nn.Module) -> list[nn.Module]:
        """The layers that the implementation reads, and their containers."""
        return list(_layers(module, module.layers))

    def is_current(self, module: nn.Module, types: Types) -> bool:
        """Whether nothing has changed since: layers, classes, attributes, hooks, tensors and their dtypes."""
        if types != self.types or type(module) is not self.kind:
            return False
        try:
            if vars(module) != self.state:
                return False
            for layer, kind, state in self.states:
                if type(layer) is not kind or vars(layer) != state:
                    return False
        except Exception:  # attributes that cannot be compared, such as arrays
            return False
        for tensor, kind, dtype, is_cpu in self.tensors:  # .data may have been replaced
            if type(tensor) is not kind or tensor.dtype is not dtype or tensor.is_cpu is not is_cpu:
                return False
        return True


_snapshots: WeakKeyDictionary[nn.Module, Snapshot] = WeakKeyDictionary()


def _state(module: nn.Module) -> dict:
    """A module's attributes, with copies of its dicts of hooks, tensors and layers."""
    return {name: value.copy() if isinstance(value, (dict, set)) else value for name, value in vars(module).items()}


def _layers(module: nn.Module, expected: dict) -> Iterator[nn.Module]:
    for name, layers in expected.items():
        layer = module._modules.get(name)
        if layer is not None:
            yield layer
            if isinstance(layers, dict):
                yield from _layers(layer, layers)


def _find_mismatch(module: nn.Module, expected: dict, types: Types) -> str | None:
    for name, kinds in expected.items():
        layer = module._modules.get(name)
        kinds = kinds if isinstance(kinds, (dict, tuple)) else (kinds,)
        if isinstance(kinds, dict):
            if type(layer) not in CONTAINERS or not is_untouched(layer) or list(layer._modules) != list(kinds):
                return name
            inner = _find_mismatch(layer, kinds, types)
            if inner is not None:
                return f'{name}.{inner}'
        elif not (any(kind.fits(layer) for kind in kinds) and _are_of(types, layer)):
            return name
    return None


def _are_of(types: Types, layer: nn.Module) -> bool:
    """Whether a layer's own tensors are plain CPU tensors of these dtypes."""
    return all(
        type(tensor) in PLAIN
        and (tensor.dtype in types or not tensor.is_floating_point())
        and tensor.is_cpu
        and tensor.layout is torch.strided
        for tensor in own_tensors(layer).values()
    )
