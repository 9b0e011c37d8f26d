"""When operators may replace PyTorch's computation, and the private names of PyTorch that this needs.

A name that PyTorch has changed is listed in :data:`UNKNOWN`; :func:`.accelerate` then keeps the reference.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..models.stock import PLAIN, STATE
from . import extension

MISSING = extension.load()  # why there are no operators, or None
UNKNOWN = [f'Module.{name}' for name in STATE if name not in vars(nn.Module())]


def _private(name: str):
    """A private name of PyTorch, such as '_C._is_tracing', or None if it does not exist."""
    try:
        return reduce(getattr, name.split('.'), torch)
    except AttributeError:
        UNKNOWN.append(f'torch.{name}')


_is_tracing = _private('_C._is_tracing')
_dispatch_modes = _private('_C._len_torch_dispatch_stack')
_function_modes = _private('_C._len_torch_function_stack')
_transform = _private('_C._functorch.peek_interpreter_stack')
_global_hooks = [
    _private(f'nn.modules.module._global_{name}_hooks')
    for name in ('forward', 'forward_pre', 'backward', 'backward_pre')
]
_mkldnn_is_enabled = _private('_C._get_mkldnn_enabled')
_dispatch_keys = _private('_C._dispatch_keys')
_dispatch_key = _private('_C._dispatch_key_parse')
_private('autograd.forward_ad._current_level')

_takes_bfloat16 = MISSING is None and torch.ops.mmstrip.takes_bfloat16()
_BATCHED = _dispatch_key and _dispatch_key('Batched')  # set by is_grads_batched=True, without functorch


def takes(dtype: torch.dtype) -> bool:
    """Whether the native operators support maps of a dtype on this CPU, in this process."""
    if dtype is torch.bfloat16:
        return _takes_bfloat16 and _mkldnn_is_enabled is not None and _mkldnn_is_enabled()
    return MISSING is None and dtype is torch.float32


def is_ordinary() -> bool:
    """Whether PyTorch runs eagerly: nothing is compiled, traced, transformed or intercepted."""
    return not (
        torch.compiler.is_compiling()  # first: compilers must not trace the rest
        or _is_tracing()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or forward_ad._current_level >= 0
        or any(_global_hooks)
    )


def are_plain(*maps: Tensor) -> bool:
    """Whether maps are plain CPU tensors of one dtype with more than one pixel, which BN needs in training."""
    dtype = maps[0].dtype
    for x in maps:
        if type(x) not in PLAIN or x.dtype is not dtype or not x.is_cpu or x.layout is not torch.strided:
            return False
        if x.dim() != 4 or x.numel() <= x.shape[1]:
            return False
    return True


def parameter_types(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Parameter dtypes for which operators compute what modules do, for maps of a dtype; empty if there are none."""
    if not takes(dtype):
        return ()
    autocast = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None
    if autocast is None:
        return (dtype,)  # modules refuse most other dtypes
    return (torch.float32, torch.bfloat16) if dtype is autocast is torch.bfloat16 else ()


def is_batched(grads: Sequence[Tensor]) -> bool:
    """Whether gradients are batched by vmap, or tensor subclasses."""
    if _transform() is not None:
        return True
    return any(type(grad) not in PLAIN or _dispatch_keys(grad).has(_BATCHED) for grad in grads)
