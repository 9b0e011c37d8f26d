"""What the formulas for compiled graphs share: when one stands in for the reference, and linear layers.

A map (N, C, H, W) of a formula lies in memory as (C, N, H, W), channel-major: all sums over tokens, as of BN, GRN and
biases, run along memory, a linear layer is one product, and halves of the channels are views.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ...models.stock import PLAIN
from ..fast import Fast


class Formula(Fast):
    """A :class:`.Fast` class for graphs: in eager mode its forward is the reference's.

    Its ``layers`` are checked while a graph is made, so that compilers guard what it relied on.
    """

    def may_run(self, x: Tensor) -> bool:
        return torch.compiler.is_compiling() and x.dim() == 4 and x.numel() > x.shape[1] and _are_stock(self)

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if valid is not None or not self.may_run(x):
            return super().forward(x) if valid is None else super().forward(x, valid=valid)
        return self.run(channel_major(x, compute_type(x))).transpose(0, 1)

    def run(self, x: Tensor) -> Tensor:
        """The formula of (C, N, H, W), contiguous."""
        raise NotImplementedError


def is_formula(module: nn.Module) -> bool:
    """Whether calling a module is calling its formula."""
    return isinstance(module, Formula) and 'reference' in vars(type(module)) and _is_called(module)


def _are_stock(module: Formula) -> bool:
    return 'reference' in vars(type(module)) and _fit(module, module.layers)


def _fit(module: nn.Module, expected: dict) -> bool:
    for name, kinds in expected.items():
        layer = module._modules.get(name)
        if isinstance(kinds, dict):
            if type(layer) is not nn.Sequential or len(layer) != len(kinds) or not _is_called(layer):
                return False
            if not _fit(layer, kinds):
                return False
        elif not _fits(layer, kinds):
            return False
    return True


def _fits(layer: nn.Module | None, stock) -> bool:
    if type(layer) is not stock.kind or not _is_called(layer):
        return False
    tensors = {**layer._parameters, **layer._buffers}
    present = {name for name, tensor in tensors.items() if tensor is not None}
    plain = all(tensor is None or type(tensor) in PLAIN for tensor in tensors.values())
    return plain and stock.tensors <= present <= stock.optional and stock.accepts(layer)


def _is_called(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(map(len, hooks)) and 'forward' not in module.__dict__


def compute_type(x: Tensor) -> torch.dtype:
    """Of what type autocast, or else the map, lets products be."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def channel_major(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(N, C, H, W) as (C, N, H, W), contiguous."""
    return x.to(dtype or x.dtype).transpose(0, 1).contiguous()


def linear(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of the channels of (C, N, H, W); weight (O, C), or of a 1x1 convolution."""
    y = _Linear.apply(weight.flatten(1), x.flatten(1)).unflatten(1, x.shape[1:])
    return y if bias is None else y + per_channel(bias.to(x.dtype))


def per_channel(x: Tensor) -> Tensor:
    """(C, ) to be spread over (C, N, H, W)."""
    return x[:, None, None, None]


class _Linear(Function):
    """A product whose weight has its gradient in its own type, without a cast after it."""

    @staticmethod
    def forward(ctx, weight: Tensor, x: Tensor) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(narrow, x)
        ctx.dtype = weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            return torch.mm(narrow, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, x = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return _product(grad, x.t(), ctx.dtype), torch.mm(weight.t(), grad)


def takes_out_dtype(x: Tensor) -> bool:
    """Whether a product of a half-precision map may give float32 (PyTorch 2.8, CUDA)."""
    return x.is_cuda and hasattr(torch.ops.aten.mm, 'dtype')


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.dtype != dtype == torch.float32 and takes_out_dtype(a):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
