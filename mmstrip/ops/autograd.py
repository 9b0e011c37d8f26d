"""Shared by the autograd Functions of the operations."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .context import is_batched


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def call_formula(module: type, x: Tensor, **layers) -> Tensor:
    """Run ``forward`` of a module's class with tensors and functions in place of its parameters and layers."""
    return module.forward(SimpleNamespace(**layers), x)


def is_differentiated(grads: Sequence[Tensor]) -> bool:
    """Whether a backward pass is itself differentiated or batched, which operators do not support."""
    return torch.is_grad_enabled() or is_batched(grads)


def reference_gradients(
    reference: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor], required: Sequence[bool] = (True,)
) -> list[Tensor | None]:
    """Recompute a reference and return its gradients, with their graph: one per input, None if not required.

    Args:
        reference: Returns one map or a sequence of maps.
        inputs: Its arguments, as saved for backward.
        grads: Gradients of its maps.
        required: Which inputs need a gradient. Defaults to the first (and only) one.
    """
    # Half-precision maps with float32 parameters were computed under autocast.
    types = {tensor.dtype for tensor in inputs if tensor is not None}
    lowest = min(types, key=lambda dtype: dtype.itemsize)
    with torch.enable_grad(), torch.autocast(grads[0].device.type, lowest, enabled=len(types) > 1):
        # Views, so that an input's gradient excludes paths through another input's graph.
        leaves = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        outputs = reference(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    needed = [leaf for leaf, need in zip(leaves, required) if need]
    found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if need else None for need in required]
