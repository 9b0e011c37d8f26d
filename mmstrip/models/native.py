"""Operators compiled from ``mmstrip/csrc``: what eager PyTorch does in several passes over memory, in one.

Optional: without them (not built, or switched off by the environment's MMSTRIP_NATIVE=0) :mod:`mmstrip.models.ops` has
another form of everything. They take float32 maps on CPUs, in eager mode.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..csrc import extension_name

operators = torch.ops.mmstrip


def _load() -> bool:
    spec = importlib.util.find_spec(extension_name())
    if spec is None or os.environ.get('MMSTRIP_NATIVE') == '0':
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        warnings.warn(f'mmstrip runs without its compiled operators, which do not load: {error}', stacklevel=2)
        return False
    return True


_enabled = _load()


def in_use() -> bool:
    """Whether the operators are there and switched on."""
    return _enabled


@contextmanager
def switched_off() -> Iterator[None]:
    """Within it nothing runs on the operators, but for backward passes of what did."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def fits(*tensors: Tensor) -> bool:
    """Whether the operators may run on these tensors here.

    Not where a graph is recorded, operations are counted or replaced, or autocast may want another precision.
    """
    if not _enabled or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == 'cpu' and tensor.dtype == torch.float32
        for tensor in tensors
    )


def has_width(weight: Tensor) -> bool:
    """Whether a depthwise kernel (C, 1, K_h, K_w) is of a width that the operators are compiled for."""
    return weight.shape[3] in (1, 3, 5, 7)
