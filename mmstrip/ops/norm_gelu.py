"""BN, then GELU, as part of other operations."""

import torch.nn.functional as F
from torch import Tensor, nn


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, variance: Tensor | None = None, eps: float = 0
) -> Tensor:
    """GELU of BN of (N, C, H, W), with statistics (C, ) or, without them, those of x."""
    mean, variance = [None if value is None else value.to(weight.dtype) for value in (mean, variance)]
    return F.gelu(F.batch_norm(x, mean, variance, weight, bias, training=mean is None, eps=eps))


def layer_arguments(norm: nn.Module, channels: int, like: Tensor) -> tuple:
    """A BN layer, or an identity in its place, as the operators take it; counts the batch in training."""
    if isinstance(norm, nn.Identity):
        ones, zeros = like.new_ones(channels), like.new_zeros(channels)
        return ones, zeros, zeros, ones, False, 0.0, 0.0
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps


def frozen_statistics(norm: Tensor, training: bool, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance for the reference, from what an operator returns of its norm; None in training."""
    return (None, None) if training else (norm[0], norm[1].square().reciprocal() - eps)
