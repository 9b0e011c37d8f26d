"""Whether Triton's kernels may run, and how they are launched."""

import torch
from torch import Tensor

try:
    import triton
    from torch.library import wrap_triton  # PyTorch 2.6

    MISSING = None
except ImportError as error:
    MISSING = str(error)

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_card(x: Tensor) -> bool:
    """Whether a kernel takes a map; ATen does otherwise. Triton's interpreter takes those on CPUs."""
    return (x.is_cuda or triton.knobs.runtime.interpret) and x.dtype in TYPES


def launch(kernel):
    """A kernel that a compiler can trace; Triton's interpreter needs no such thing."""
    return kernel if triton.knobs.runtime.interpret else wrap_triton(kernel)


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two from a number on, within bounds that are powers of two themselves."""
    return min(max(triton.next_power_of_2(number), least), most)


def precision(x: Tensor) -> str:
    """How products of float32 maps are taken: as PyTorch's switch for convolutions says."""
    return 'tf32' if x.is_cuda and torch.backends.cudnn.allow_tf32 else 'ieee'
