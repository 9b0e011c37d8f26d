"""GELU and GRN of channel-major maps (C, N, H, W): two kernels forward, two backward.

The first takes the sums over a map's tokens, the second those over channels, which are few, and what follows. Backward
computes GELU again.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.library import triton_op

from ...models.channel_mixing import SMALLEST_NORM, GlobalResponseNorm
from .kernels import gelu, gelu_slope, launch, on_card, wide

ROWS, TOKENS, CHANNELS = 16, 64, 256  # per program's tile, and per step in sums over channels
SMALLEST = tl.constexpr(SMALLEST_NORM)


@triton.jit
def _load_gelu(x_ptr, bias, start, token, mask):
    x = tl.load(x_ptr + start[:, None] + token[None, :], mask=mask, other=0.0).to(tl.float32) + bias[:, None]
    return x, tl.where(mask, gelu(x), 0.0)


@triton.jit
def _sum_tokens(
    x_ptr, bias_ptr, grad_ptr, sums_ptr, parts_ptr, channels, images, size,
    backward: tl.constexpr, row_block: tl.constexpr, token_block: tl.constexpr,
):  # fmt: skip
    """Norms (N, C); or sums of gradient times GELU and of the gradient: the first of the parts (3, N, C)."""
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    channel, image = row // images, row % images
    ours = channel < channels
    bias = tl.load(bias_ptr + channel, mask=ours, other=0.0).to(tl.float32)
    start = row.to(tl.int64) * size
    sums, products = tl.zeros((row_block, token_block), tl.float32), tl.zeros((row_block, token_block), tl.float32)
    for first in range(0, size, token_block):
        token = first + tl.arange(0, token_block)
        mask = ours[:, None] & (token < size)[None, :]
        _, y = _load_gelu(x_ptr, bias, start, token, mask)
        if backward:
            grad = tl.load(grad_ptr + start[:, None] + token[None, :], mask=mask, other=0.0).to(tl.float32)
            sums += grad
            products += grad * y
        else:
            products += y * y
    there = image * channels + channel
    product = tl.sum(products, 1)
    if backward:
        tl.store(parts_ptr + there, tl.sum(sums, 1), mask=ours)
    else:
        product = tl.sqrt(tl.maximum(product, SMALLEST * SMALLEST))
    tl.store(sums_ptr + there, product, mask=ours)


@triton.jit
def _apply(
    x_ptr, bias_ptr, norm_ptr, gamma_ptr, beta_ptr, y_ptr, channels, images, size, eps,
    has_beta: tl.constexpr, row_block: tl.constexpr, token_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1)
    norms = tl.zeros((block,), tl.float32)
    for first in range(0, channels, block):
        at = first + tl.arange(0, block)
        norms += tl.load(norm_ptr + image * channels + at, mask=at < channels, other=0.0)
    mean = tl.sum(norms) / channels + eps
    channel = tl.program_id(0) * row_block + tl.arange(0, row_block)
    ours = channel < channels
    norm = tl.load(norm_ptr + image * channels + channel, mask=ours, other=0.0)
    factor = 1 + tl.load(gamma_ptr + channel, mask=ours, other=0.0).to(tl.float32) * norm / mean
    bias = tl.load(bias_ptr + channel, mask=ours, other=0.0).to(tl.float32)
    start = (channel.to(tl.int64) * images + image) * size
    for first in range(0, size, token_block):
        token = first + tl.arange(0, token_block)
        mask = ours[:, None] & (token < size)[None, :]
        _, y = _load_gelu(x_ptr, bias, start, token, mask)
        y *= factor[:, None]
        if has_beta:
            y += tl.load(beta_ptr + channel, mask=ours, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + start[:, None] + token[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, x_ptr, bias_ptr, norm_ptr, gamma_ptr, sums_ptr, grad_x_ptr, parts_ptr, channels, images, size, eps,
    row_block: tl.constexpr, token_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and per image those of gamma and bias: the other two of the parts."""
    image = tl.program_id(1)
    norms, through = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    for first in range(0, channels, block):
        at = first + tl.arange(0, block)
        norm = tl.load(norm_ptr + image * channels + at, mask=at < channels, other=0.0)
        gamma = tl.load(gamma_ptr + at, mask=at < channels, other=0.0).to(tl.float32)
        norms += norm
        through += tl.load(sums_ptr + image * channels + at, mask=at < channels, other=0.0) * gamma * norm
    mean = tl.sum(norms) / channels + eps
    common = tl.sum(through) / (mean * channels)  # gradient through the mean of the norms
    channel = tl.program_id(0) * row_block + tl.arange(0, row_block)
    ours = channel < channels
    there = image * channels + channel
    norm = tl.load(norm_ptr + there, mask=ours, other=1.0)
    gamma = tl.load(gamma_ptr + channel, mask=ours, other=0.0).to(tl.float32)
    product = tl.load(sums_ptr + there, mask=ours, other=0.0)
    factor = 1 + gamma * norm / mean
    slope = tl.where(norm > 1.001 * SMALLEST, (product * gamma - common) / (mean * norm), 0.0)  # if not clamped
    bias = tl.load(bias_ptr + channel, mask=ours, other=0.0).to(tl.float32)
    start = (channel.to(tl.int64) * images + image) * size
    total = tl.zeros((row_block, token_block), tl.float32)
    for first in range(0, size, token_block):
        token = first + tl.arange(0, token_block)
        mask = ours[:, None] & (token < size)[None, :]
        x, y = _load_gelu(x_ptr, bias, start, token, mask)
        grad = tl.load(grad_ptr + start[:, None] + token[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(mask, (grad * factor[:, None] + y * slope[:, None]) * gelu_slope(x), 0.0)
        total += grad
        tl.store(grad_x_ptr + start[:, None] + token[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + images * channels + there, product * norm / mean, mask=ours)
    tl.store(parts_ptr + 2 * images * channels + there, tl.sum(total, 1), mask=ours)


@triton_op('mmstrip_gpu::response_norm', mutates_args={})
def _response_norm(x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """GRN of GELU of x plus bias, and the norms (N, C) in at least float32."""
    channels, images, height, width = x.shape
    size = height * width
    if not on_card(x):
        y = F.gelu((x + _spread(bias)).to(wide(x.dtype)))
        norm = y.square().sum((2, 3)).clamp_min(SMALLEST_NORM**2).sqrt()
        y = y * (1 + gamma[:, None] * norm / (norm.mean(0) + eps))[:, :, None, None]
        return (y if beta is None else y + _spread(beta)).to(x.dtype), norm.t().contiguous()
    norm = x.new_empty((images, channels), dtype=torch.float32)
    y = torch.empty_like(x)
    launch(_sum_tokens)[triton.cdiv(channels * images, ROWS),](
        x, bias, x, norm, norm, channels, images, size, backward=False, row_block=ROWS, token_block=TOKENS
    )
    launch(_apply)[triton.cdiv(channels, ROWS), images](
        x, bias, norm, gamma, gamma if beta is None else beta, y, channels, images, size, eps,
        has_beta=beta is not None, row_block=ROWS, token_block=TOKENS, block=CHANNELS,
    )  # fmt: skip
    return y, norm


@triton_op('mmstrip_gpu::response_norm_backward', mutates_args={})
def _response_norm_backward(
    grad: Tensor, x: Tensor, bias: Tensor, norm: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and per image those of beta, gamma and bias: (3, N, C)."""
    channels, images, height, width = x.shape
    size = height * width
    if not on_card(x):
        dtype, x = x.dtype, (x + _spread(bias)).to(norm.dtype)
        y, grad = F.gelu(x), grad.to(norm.dtype)
        product, of_beta = (grad * y).sum((2, 3)).t(), grad.sum((2, 3)).t()
        mean = norm.mean(1, keepdim=True) + eps
        through = product * gamma
        slope = (through - (through * norm).mean(1, keepdim=True) / mean) / (mean * norm)
        slope = torch.where(norm > 1.001 * SMALLEST_NORM, slope, 0)
        factor = 1 + gamma * norm / mean
        grad = grad * factor.t()[:, :, None, None] + y * slope.t()[:, :, None, None]
        grad = torch.ops.aten.gelu_backward(grad, x)
        return grad.to(dtype), torch.stack([of_beta, product * norm / mean, grad.sum((2, 3)).t()])
    sums, parts = (x.new_empty((count, images, channels), dtype=torch.float32) for count in (1, 3))
    grad_x = torch.empty_like(x)
    launch(_sum_tokens)[triton.cdiv(channels * images, ROWS),](
        x, bias, grad, sums, parts, channels, images, size, backward=True, row_block=ROWS, token_block=TOKENS
    )
    launch(_backward)[triton.cdiv(channels, ROWS), images](
        grad, x, bias, norm, gamma, sums, grad_x, parts, channels, images, size, eps,
        row_block=ROWS, token_block=TOKENS, block=CHANNELS,
    )  # fmt: skip
    return grad_x, parts


def _spread(x: Tensor) -> Tensor:
    return x[:, None, None, None]


class _ResponseNorm(Function):
    @staticmethod
    def forward(ctx, x, bias, gamma, beta, eps):
        y, norm = _response_norm(x, bias, gamma, beta, eps)
        ctx.save_for_backward(x, bias, gamma, norm)
        ctx.eps, ctx.has_beta = eps, beta is not None
        return y

    @staticmethod
    def backward(ctx, grad):
        x, bias, gamma, norm = ctx.saved_tensors
        grad_x, parts = _response_norm_backward(grad.contiguous(), x, bias, norm, gamma, ctx.eps)
        grad_beta, grad_gamma, grad_bias = parts.sum(1).to(gamma.dtype)
        return grad_x, grad_bias.to(bias.dtype), grad_gamma, grad_beta if ctx.has_beta else None, None


def gelu_response_norm(x: Tensor, bias: Tensor, grn: GlobalResponseNorm) -> Tensor:
    """GRN of GELU of x (C, N, H, W) plus bias (C, )."""
    return _ResponseNorm.apply(x, bias, grn.gamma, grn.beta, grn.eps)
