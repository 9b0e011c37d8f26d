"""BN by batch statistics and GELU, of channel-major maps: one kernel forward, one backward, a program a channel.

Running statistics move in the kernel. Backward computes the normalised map again instead of keeping it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd import Function
from torch.library import triton_op

from .kernels import block_size, gelu, gelu_slope, launch, on_card, welford, wide


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, mean_ptr, variance_ptr, running_mean_ptr, running_var_ptr, count_ptr,
    size, eps, momentum, has_shift: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0)
    start = channel.to(tl.int64) * size
    count, mean, squares = (
        tl.zeros((block,), tl.float32),
        tl.zeros((block,), tl.float32),
        tl.zeros((block,), tl.float32),
    )
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        x = tl.load(x_ptr + start + at, mask=at < size, other=0.0).to(tl.float32)
        count, mean, squares = welford(x, at < size, count, mean, squares)
    center = tl.sum(count * mean) / size
    variance = tl.sum(squares + count * (mean - center) * (mean - center)) / size
    tl.store(mean_ptr + channel, center)
    tl.store(variance_ptr + channel, variance)
    running = tl.load(running_var_ptr + channel)
    tl.store(running_var_ptr + channel, running + momentum * (variance * size / (size - 1) - running))
    running = tl.load(running_mean_ptr + channel)
    shifted = center
    if has_shift:
        shifted += tl.load(shift_ptr + channel).to(tl.float32)
    tl.store(running_mean_ptr + channel, running + momentum * (shifted - running))
    if channel == 0:
        tl.store(count_ptr, tl.load(count_ptr) + 1)
    scale = tl.load(weight_ptr + channel).to(tl.float32) / tl.sqrt(variance + eps)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        x = tl.load(x_ptr + start + at, mask=at < size, other=0.0).to(tl.float32)
        y = gelu((x - center) * scale + bias)
        tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, variance_ptr, more_ptr, grad_x_ptr, sums_ptr, channels, size, eps,
    has_more: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0)
    start = channel.to(tl.int64) * size
    center = tl.load(mean_ptr + channel)
    inverse = 1 / tl.sqrt(tl.load(variance_ptr + channel) + eps)
    weight = tl.load(weight_ptr + channel).to(tl.float32)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    sums, products = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        normed = (tl.load(x_ptr + start + at, mask=at < size, other=0.0).to(tl.float32) - center) * inverse
        grad = tl.load(grad_ptr + start + at, mask=at < size, other=0.0).to(tl.float32)
        grad *= gelu_slope(normed * weight + bias)
        sums += grad
        products += grad * normed
    total, product = tl.sum(sums), tl.sum(products)
    tl.store(sums_ptr + channel, product)  # of weight
    tl.store(sums_ptr + channels + channel, total)  # of bias
    tl.store(sums_ptr + 2 * channels + channel, 0.0)  # of what was added to x, which the mean removes
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        normed = (tl.load(x_ptr + start + at, mask=at < size, other=0.0).to(tl.float32) - center) * inverse
        grad = tl.load(grad_ptr + start + at, mask=at < size, other=0.0).to(tl.float32)
        grad *= gelu_slope(normed * weight + bias)
        grad = (grad - total / size - normed * product / size) * weight * inverse
        if has_more:
            grad += tl.load(more_ptr + start + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + at, grad.to(grad_x_ptr.dtype.element_ty), mask=at < size)


@triton_op('mmstrip_gpu::norm_gelu', mutates_args={'running_mean', 'running_var', 'count'})
def _norm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    running_mean: Tensor, running_var: Tensor, count: Tensor, eps: float, momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """For x (C, N, H, W): GELU of BN; mean and biased variance in at least float32."""
    size = x.shape[1] * x.shape[2] * x.shape[3]
    if not on_card(x):
        variance, mean = torch.var_mean(x.to(wide(x.dtype)), (1, 2, 3), correction=0)
        running_mean.lerp_((mean if shift is None else mean + shift).to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (size / (size - 1))).to(running_var.dtype), momentum)
        count.add_(1)
        return F.gelu(_normed(x, mean, variance, eps) * _spread(weight) + _spread(bias)).to(x.dtype), mean, variance
    y = torch.empty_like(x)
    mean, variance = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    launch(_forward)[x.shape[0],](
        x, weight, bias, weight if shift is None else shift, y, mean, variance, running_mean, running_var, count,
        size, eps, momentum, has_shift=shift is not None, block=block_size(size, 256, 4096), num_warps=8,
    )  # fmt: skip
    return y, mean, variance


@triton_op('mmstrip_gpu::norm_gelu_backward', mutates_args={})
def _norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, more: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, plus ``more``, and of weight, bias and what was added to x (3, C)."""
    if not on_card(x):
        normed = _normed(x, mean, variance, eps)
        grad = torch.ops.aten.gelu_backward(grad.to(normed.dtype), normed * _spread(weight) + _spread(bias))
        product, total = (grad * normed).sum((1, 2, 3)), grad.sum((1, 2, 3))
        sums = torch.stack([product, total, torch.zeros_like(total)])
        product, total = (_spread(part) / x[0].numel() for part in (product, total))
        grad = (grad - total - normed * product) * _spread(weight * (variance + eps).rsqrt())
        return (grad if more is None else grad + more).to(x.dtype), sums
    grad_x = torch.empty_like(x)
    sums = x.new_empty((3, x.shape[0]), dtype=torch.float32)
    size = x.shape[1] * x.shape[2] * x.shape[3]
    launch(_backward)[x.shape[0],](
        grad, x, weight, bias, mean, variance, x if more is None else more, grad_x, sums, x.shape[0], size, eps,
        has_more=more is not None, block=block_size(size, 256, 4096), num_warps=8,
    )  # fmt: skip
    return grad_x, sums


def _spread(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def _normed(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return (x - _spread(mean)) * _spread((variance + eps).rsqrt())


class _NormGELU(Function):
    """With ``keeps``, x is returned too, and the gradient that it gets there is added in the kernel."""

    @staticmethod
    def forward(ctx, x, weight, bias, shift, running_mean, running_var, count, eps, momentum, keeps):
        y, mean, variance = _norm_gelu(x, weight, bias, shift, running_mean, running_var, count, eps, momentum)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps, ctx.shift = eps, None if shift is None else shift.dtype
        return (y, x.view_as(x)) if keeps else y

    @staticmethod
    def backward(ctx, grad, more=None):
        x, weight, bias, mean, variance = ctx.saved_tensors
        more = None if more is None else more.contiguous()
        grad_x, sums = _norm_gelu_backward(grad.contiguous(), x, weight, bias, mean, variance, more, ctx.eps)
        grad_shift = None if ctx.shift is None else sums[2].to(ctx.shift)
        return grad_x, sums[0].to(weight.dtype), sums[1].to(bias.dtype), grad_shift, *[None] * 6


def norm_gelu(norm: nn.BatchNorm2d, x: Tensor, shift: Tensor | None = None, keeps: bool = False):
    """GELU of BN of x (C, N, H, W) plus shift (C, ); with ``keeps`` also x, for other readers."""
    if not norm.training:
        shifted = x if shift is None else x + _spread(shift.to(x.dtype))
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        y = F.gelu((shifted - _spread(norm.running_mean)) * _spread(scale) + _spread(norm.bias)).to(x.dtype)
        return (y, x) if keeps else y
    running = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return _NormGELU.apply(x, norm.weight, norm.bias, shift, *running, norm.eps, norm.momentum, keeps)
