"""Modules of the paper that another implementation may stand in for, and when it does."""

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
    """Comes before a module's class: ``class FastX(Fast, X)`` computes in another way what X does.

    :func:`.accelerate` gives a module such a class, so all that it holds stays what it was. Its ``forward`` asks
    :meth:`may_run`, and is that of X where the answer is no.

    Attributes:
        reference (type): X.
        layers (dict): What the layers that it reads must be: name to a :class:`.Stock`, several of them, or a dict of
            the same for a container. Layers that are not named must be called, as modules.
    """

    reference: type
    layers: dict = {}

    def may_run(self, x: Tensor) -> bool:
        """Whether nobody can tell the difference on a map (N, C, H, W), but by the clock."""
        types = self.parameter_types(x)
        if not types:
            return False
        snapshot = _snapshots.get(self)
        if snapshot is None or not snapshot.is_current(self, types):
            snapshot = _snapshots[self] = Snapshot(self, types)
        return snapshot.is_stock

    @staticmethod
    def parameter_types(x: Tensor) -> Types:
        """Of which types parameters may be for the implementation to run on a map, now; none, if it does not."""
        return parameter_types(x.dtype) if is_ordinary() and are_plain(x) else ()

    @classmethod
    def find_mismatch(cls, module: nn.Module, types: Types) -> str | None:
        """The first layer that is not as X is built, by its name in a module; '' for the module, None if all are."""
        # What calls a module's forward, as checkpointing does, is no matter of its.
        methods = replaced_methods(module) - {'forward', '_compiled_call_impl'}
        if class_of(module) is not cls.reference or methods or not _are_of(types, module):
            return ''
        return _find_mismatch(module, cls.layers, types)

    def __reduce_ex__(self, protocol):
        """Pickles are of the reference."""
        return object.__new__, (self.reference,), self.__getstate__()

    def __deepcopy__(self, memo: dict):
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = {name: value for name, value in vars(self).items() if name != '_compiled_call_impl'}
        vars(copied).update(copy.deepcopy(state, memo))
        return copied


class Snapshot:
    """A module and the layers that its implementation reads, as they were when it was asked whether they are stock.

    Args:
        module: Of a :class:`Fast` class.
        types: Of which types its parameters may be.
    """

    def __init__(self, module: nn.Module, types: Types):
        self.types, layers = types, self.layers_of(module)
        self.kind, self.state = type(module), _state(module)  # not the module itself, whose end frees all this
        self.states = [(layer, type(layer), _state(layer)) for layer in layers]
        tensors = (tensor for layer in (module, *layers) for tensor in own_tensors(layer).values())
        self.tensors = [(tensor, type(tensor), tensor.dtype, tensor.is_cpu) for tensor in tensors]
        self.is_stock = module.find_mismatch(module, types) is None

    def layers_of(self, module: nn.Module) -> list[nn.Module]:
        """Layers that the implementation reads, and the containers that they are in."""
        return list(_layers(module, module.layers))

    def is_current(self, module: nn.Module, types: Types) -> bool:
        """Whether nothing has changed since: no layer, class, attribute, hook or tensor, nor a tensor's type."""
        if types != self.types or type(module) is not self.kind:
            return False
        try:
            if vars(module) != self.state:
                return False
            for layer, kind, state in self.states:
                if type(layer) is not kind or vars(layer) != state:
                    return False
        except Exception:  # of another tensor or array, which compares element by element, or whatever was put there
            return False
        for tensor, kind, dtype, is_cpu in self.tensors:  # their .data may be another one
            if type(tensor) is not kind or tensor.dtype is not dtype or tensor.is_cpu is not is_cpu:
                return False
        return True


_snapshots: WeakKeyDictionary[nn.Module, Snapshot] = WeakKeyDictionary()


def _state(module: nn.Module) -> dict:
    """A module's attributes, with copies of what holds its hooks, tensors and layers."""
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
    """Whether a layer's own tensors are plain ones on CPUs, of one of these types."""
    return all(
        type(tensor) in PLAIN
        and (tensor.dtype in types or not tensor.is_floating_point())
        and tensor.is_cpu
        and tensor.layout is torch.strided
        for tensor in own_tensors(layer).values()
    )
