"""What the formulas for compiled graphs share: when one stands in for the reference, and channel-major maps.

A map (N, C, H, W) of a formula lies in memory as (C, N, H, W): all sums over tokens, as of BN, GRN and biases, run
along memory, a linear layer is one product, and halves of the channels are views.
"""

import torch
from torch import Tensor, nn

from ...models.stock import PLAIN
from ..fast import Fast


class Compiled(Fast):
    """A :class:`.Fast` class for graphs: in eager mode its forward is the reference's.

    Its ``layers`` are checked while the graph is made, so that compilers guard what it relied on.
    """

    def may_run(self, x: Tensor) -> bool:
        return torch.compiler.is_compiling() and x.dim() == 4 and self.is_stock()

    def is_stock(self) -> bool:
        """Whether all layers are what the network was built with."""
        return _are_stock(self, self.layers)


def _are_stock(module: nn.Module, expected: dict) -> bool:
    for name, kinds in expected.items():
        layer = module._modules.get(name)
        if isinstance(kinds, dict):
            if type(layer) is not nn.Sequential or len(layer) != len(kinds) or not _are_stock(layer, kinds):
                return False
        elif not any(_is_stock(layer, kind) for kind in (kinds if isinstance(kinds, tuple) else (kinds,))):
            return False
    return True


def _is_stock(layer: nn.Module | None, stock) -> bool:
    kind = type(layer)
    if kind is not stock.kind and getattr(kind, 'reference', None) is not stock.kind:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if 'forward' in layer.__dict__:
        return False
    tensors = {**layer._parameters, **layer._buffers}
    present = {name for name, tensor in tensors.items() if tensor is not None}
    plain = all(tensor is None or type(tensor) in PLAIN for tensor in tensors.values())
    return plain and stock.tensors <= present <= stock.optional and stock.accepts(layer)


def compute_type(x: Tensor) -> torch.dtype:
    """Of what type autocast, or else the map, lets products be."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def channel_major(x: Tensor) -> Tensor:
    """(N, C, H, W) as (C, N, H, W), contiguous, of the type that products take."""
    return x.to(compute_type(x)).transpose(0, 1).contiguous()


def linear(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of the channels of (C, N, H, W)."""
    y = torch.mm(weight.to(x.dtype), x.flatten(1)).unflatten(1, x.shape[1:])
    return y if bias is None else y + per_channel(bias.to(x.dtype))


def per_channel(x: Tensor) -> Tensor:
    """(C, ) to be spread over (C, N, H, W)."""
    return x[:, None, None, None]


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """BN of (C, N, H, W)."""
    return norm(x.transpose(0, 1)).transpose(0, 1).contiguous()
