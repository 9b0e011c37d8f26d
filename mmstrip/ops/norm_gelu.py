"""BN and GELU as parts of other operations."""

import torch.nn.functional as F
from torch import Tensor, nn


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, variance: Tensor | None = None, eps: float = 0
) -> Tensor:
    """GELU(BN(x)) of (N, C, H, W), with the given statistics (C, ) or those of x."""
    mean, variance = [None if value is None else value.to(weight.dtype) for value in (mean, variance)]
    return F.gelu(F.batch_norm(x, mean, variance, weight, bias, training=mean is None, eps=eps))


def layer_arguments(norm: nn.Module, channels: int, like: Tensor) -> tuple:
    """Arguments of the operators for a BN layer or an identity; counts the batch in training."""
    if isinstance(norm, nn.Identity):
        ones, zeros = like.new_ones(channels), like.new_zeros(channels)
        return ones, zeros, zeros, ones, False, 0.0, 0.0
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps


def frozen_statistics(norm: Tensor, training: bool, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance for the reference, from the norm that an operator returned; None in training."""
    return (None, None) if training else (norm[0], norm[1].square().reciprocal() - eps)
