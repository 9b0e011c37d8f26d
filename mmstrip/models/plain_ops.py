"""The formulas of :mod:`mmstrip.models.ops` written out with ordinary layers: what tests and benchmarks compare with.

Concatenations, grouped convolutions for the strip layers and PyTorch's own gradients, as the network is usually
written. Nothing here is fast.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native, ops


def pointwise(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    out = F.conv2d(torch.cat(list(parts), dim=1), weight, bias)
    return out if residual is None else residual + out


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return sum(part * weight for part, weight in zip(parts, weights))


def norm_activate_depthwise(norm: nn.Module, act: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return depthwise(act(norm(x)), weight)


def local_strips(u: Tensor, tall: Tensor, wide: Tensor, reweight: nn.Sequential) -> Tensor:
    paths = depthwise(u, tall), depthwise(u, wide), u
    average = sum(path.mean(dim=(2, 3), keepdim=True) for path in paths)
    weights = reweight(average).unflatten(1, (-1, 3)).softmax(dim=2)
    return weighted_sum(paths, weights.unbind(dim=2))


def sum_tokens(x: Tensor) -> Tensor:
    return x.sum(dim=(1, 2), keepdim=True)


def strip_layer(x: Tensor, weight: Tensor, bias: Tensor, axis: str, position: Tensor | None = None) -> Tensor:
    """Tokens become channels, groups of them patches: a strip is then a grouped convolution over lines."""
    if position is not None:
        x = x + position
    if axis == 'row':
        x = x.transpose(2, 3)
    patches, strip_width, tokens, _ = weight.shape
    batch, channels, _, lines = x.shape
    x = x.reshape(batch * channels // patches, patches * tokens, 1, lines)
    kernel = weight.permute(0, 2, 3, 1).reshape(patches * tokens, tokens, 1, strip_width)
    shared = bias.flatten() if bias.dim() == 2 else None
    y = F.conv2d(x, kernel, shared, padding=(0, strip_width // 2), groups=patches)
    y = y.reshape(batch, channels, tokens, lines)
    y = y.transpose(2, 3) if axis == 'row' else y
    return y if bias.dim() == 2 else y + bias


def norm_activate(norm: nn.Module, act: nn.Module, x: Tensor, parts: int = 1) -> list[Tensor]:
    return list(act(norm(x)).chunk(parts, dim=1))


def pointwise_norm_activate(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, norm: nn.Module, act: nn.Module, chunks: int = 1
) -> list[Tensor]:
    return norm_activate(norm, act, pointwise(parts, weight, bias), chunks)


def response_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    norm = x.square().sum(dim=(1, 2), keepdim=True).clamp_min(1e-24).sqrt()
    return x + gamma * (x * (norm / (norm.mean(dim=-1, keepdim=True) + eps)))


def gelu_response_norm_linear(x: Tensor, gamma: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(response_norm(F.gelu(x), gamma, eps), weight, bias)


def channel_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    expand: nn.Linear,
    act: nn.Module,
    grn: nn.Module,
    reduce: nn.Linear,
    residual: Tensor | None = None,
) -> Tensor:
    hidden = response_norm(act(expand(norm(x.permute(0, 2, 3, 1)))), grn.gamma, grn.eps)
    out = F.linear(hidden, reduce.weight, grn.shifted_bias(reduce)).permute(0, 3, 1, 2)
    return out if residual is None else residual + out


FORMULAS = (
    pointwise,
    depthwise,
    norm_activate_depthwise,
    local_strips,
    weighted_sum,
    sum_tokens,
    strip_layer,
    norm_activate,
    pointwise_norm_activate,
    response_norm,
    gelu_response_norm_linear,
    channel_mlp,
)


@contextmanager
def plain_formulas() -> Iterator[None]:
    """Within it every Strip-MLP runs on the plain formulas, forward and (if the step ends within it) backward."""
    with patch.multiple(ops, **{formula.__name__: formula for formula in FORMULAS}), native.switched_off():
        yield
