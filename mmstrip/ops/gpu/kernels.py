"""Shared parts of the Triton kernels: whether they may run, how they are launched, helper functions."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from torch.library import wrap_triton  # PyTorch 2.6

    MISSING = None
except ImportError as error:
    MISSING = str(error)

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
TYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS = 120  # that sums over a whole map are split into, if there is enough to sum


def on_card(x: Tensor) -> bool:
    """Whether a Triton kernel runs on a map; otherwise ATen does. Triton's interpreter runs on CPUs."""
    return (x.is_cuda or INTERPRETED) and x.dtype in TYPES


def launch(kernel):
    """A kernel that compilers can trace; under Triton's interpreter, the kernel itself."""
    return kernel if INTERPRETED else wrap_triton(kernel)


_accesses: dict[tuple, object] = {}


@contextmanager
def analyzing_once() -> Iterator[None]:
    """Let PyTorch remember which arguments a kernel of ours reads and writes, while it compiles.

    It parses the kernel whenever it asks, several times per launch: nearly half of what compiling a block takes before
    Triton's own compiler.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    analyze = getattr(triton_kernel_wrap, 'identify_accessed_tensors', None)  # private; PyTorch 2.12 and 2.13 have it
    if analyze is None:
        yield
        return

    def remember(kernel, arguments: dict, *rest):
        if not getattr(kernel, '__module__', '').startswith('mmstrip.'):
            return analyze(kernel, arguments, *rest)
        # Only a map's type matters, and whether a number is None; constants may decide what is read.
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        kinds = {name: getattr(value, 'dtype', value is None) for name, value in arguments.items()}
        key = kernel, *(kinds | {name: arguments[name] for name in constants & arguments.keys()}).items()
        if key not in _accesses:
            _accesses[key] = analyze(kernel, arguments, *rest)
        return _accesses[key]

    triton_kernel_wrap.identify_accessed_tensors = remember
    try:
        yield
    finally:
        triton_kernel_wrap.identify_accessed_tensors = analyze


def block_size(number: int, least: int = 16, most: int = 64) -> int:
    """The next power of two, within bounds. It only compares, so that sizes may be symbols."""
    while least < most and least < number:
        least *= 2
    return least


def precision(x: Tensor) -> str:
    """Precision of float32 products, by PyTorch's switch for convolutions."""
    return 'tf32' if x.is_cuda and torch.backends.cudnn.allow_tf32 else 'ieee'


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, at least float32."""
    return torch.promote_types(dtype, torch.float32)


def total(parts: Tensor) -> Tensor:
    """The sum over the first axis."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


if MISSING is None:

    @triton.jit
    def gelu(x):
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))

    @triton.jit
    def gelu_slope(x):
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327

    @triton.jit
    def welford(x, mask, count, mean, squares):
        """Add a value per lane to the running count, mean, and sum of squared distances."""
        count += tl.where(mask, 1.0, 0.0)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        squares += delta * tl.where(mask, x - mean, 0.0)
        return count, mean, squares
