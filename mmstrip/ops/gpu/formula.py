"""Shared parts of the formulas for compiled graphs: the check that one applies, and linear layers.

A map (N, C, H, W) of a formula lies in memory as (C, N, H, W), channel-major: all sums over tokens, as of BN, GRN and
biases, run along memory, a linear layer is one product, and halves of the channels are views.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ...models.stock import PLAIN


def is_stock(module: nn.Module, kind: type, layers: dict) -> bool:
    """Whether a module is of a class, without hooks, and its layers are those that the network was built with.

    Called while a graph is traced, so that the compiler guards all that it reads.

    Args:
        layers: See :class:`.Fast`.
    """
    return type(module) is kind and is_called(module) and _fit(module, layers)


def is_called(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(map(len, hooks)) and 'forward' not in module.__dict__


def _fit(module: nn.Module, expected: dict) -> bool:
    for name, kinds in expected.items():
        layer = module._modules.get(name)
        if isinstance(kinds, dict):
            if not is_stock(layer, nn.Sequential, kinds) or len(layer) != len(kinds):
                return False
        elif not _fits(layer, kinds):
            return False
    return True


def _fits(layer: nn.Module | None, stock) -> bool:
    if type(layer) is not stock.kind or not is_called(layer):
        return False
    tensors = {**layer._parameters, **layer._buffers}
    present = {name for name, tensor in tensors.items() if tensor is not None}
    plain = all(tensor is None or type(tensor) in PLAIN for tensor in tensors.values())
    return plain and stock.tensors <= present <= stock.optional and stock.accepts(layer)


def compute_type(x: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's, or else that of the map."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def channel_major(x: Tensor) -> Tensor:
    """(N, C, H, W) as (C, N, H, W), contiguous."""
    return x.transpose(0, 1).contiguous()


Weights = tuple[Tensor, Tensor]


def narrow(weights: list[Tensor], dtype: torch.dtype) -> list[Weights]:
    """Weights (O, C, ...) as (O, C), each with a copy in another type; all copies are made in one kernel."""
    with torch.no_grad():
        narrowed = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(narrowed, weights)
    return [(weight.flatten(1), other.flatten(1)) for weight, other in zip(weights, narrowed)]


def linear(weights: Weights, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer over the channels of (C, N, H, W); ``weights`` are a result of :func:`narrow`."""
    y = _Linear.apply(*weights, x.flatten(1)).unflatten(1, x.shape[1:])
    return y if bias is None else y + bias[:, None, None, None].to(x.dtype)


class _Linear(Function):
    """A matrix product that computes the weight's gradient in the weight's type, without a cast afterwards."""

    @staticmethod
    def forward(ctx, weight: Tensor, narrowed: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(narrowed, x)
        ctx.dtype = weight.dtype
        return torch.mm(narrowed, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        narrowed, x = ctx.saved_tensors
        return _product(grad, x.t(), ctx.dtype), None, torch.mm(narrowed.t(), grad)


def takes_out_dtype(x: Tensor) -> bool:
    """Whether a product of half-precision maps can return float32 (PyTorch 2.8, CUDA)."""
    return x.is_cuda and hasattr(torch.ops.aten.mm, 'dtype')


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.dtype != dtype == torch.float32 and takes_out_dtype(a):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
