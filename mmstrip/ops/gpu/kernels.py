"""Whether Triton's kernels may run, how they are launched, and what they share."""

import os

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
PROGRAMS = 120  # that sums over a whole map are shared between, at least where there is enough to share


def on_card(x: Tensor) -> bool:
    """Whether a kernel takes a map; ATen does otherwise. Triton's interpreter takes those on CPUs."""
    return (x.is_cuda or INTERPRETED) and x.dtype in TYPES


def launch(kernel):
    """A kernel that a compiler can trace; Triton's interpreter needs no such thing."""
    return kernel if INTERPRETED else wrap_triton(kernel)


def block_size(number: int, least: int = 16, most: int = 64) -> int:
    """The smallest power of two from a number on, within bounds; by comparisons alone, for sizes that are symbols."""
    while least < most and least < number:
        least *= 2
    return least


def precision(x: Tensor) -> str:
    """How products of float32 maps are taken: as PyTorch's switch for convolutions says."""
    return 'tf32' if x.is_cuda and torch.backends.cudnn.allow_tf32 else 'ieee'


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums: at least float32."""
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
        """Take one more value in each lane: their number, mean, and squared distances from it."""
        count += tl.where(mask, 1.0, 0.0)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        squares += delta * tl.where(mask, x - mean, 0.0)
        return count, mean, squares
