"""LayerNorm over the channels of channel-major maps: one kernel forward, one backward.

The gradients of weight and bias come as sums over the tokens of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd import Function
from torch.library import triton_op

from .kernels import launch, on_card, welford, wide

TOKENS, CHANNELS = 64, 32  # of a program's tile


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, inverse_ptr, channels, size, eps,
    token_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * token_block + tl.arange(0, token_block)
    count = tl.zeros((block, token_block), tl.float32)
    mean = tl.zeros((block, token_block), tl.float32)
    squares = tl.zeros((block, token_block), tl.float32)
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        mask = (channel < channels)[:, None] & (token < size)[None, :]
        place = channel[:, None].to(tl.int64) * size + token[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        count, mean, squares = welford(x, mask, count, mean, squares)
    center = tl.sum(count * mean, 0) / channels
    distance = mean - center[None, :]
    inverse = 1 / tl.sqrt(tl.sum(squares + count * distance * distance, 0) / channels + eps)
    tl.store(mean_ptr + token, center, mask=token < size)
    tl.store(inverse_ptr + token, inverse, mask=token < size)
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        mask = (channel < channels)[:, None] & (token < size)[None, :]
        place = channel[:, None].to(tl.int64) * size + token[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        y = (x - center[None, :]) * inverse[None, :] * weight[:, None] + bias[:, None]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, inverse_ptr, grad_x_ptr, parts_ptr, channels, size,
    token_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * token_block + tl.arange(0, token_block)
    center = tl.load(mean_ptr + token, mask=token < size, other=0.0)
    inverse = tl.load(inverse_ptr + token, mask=token < size, other=0.0)
    sums = tl.zeros((block, token_block), tl.float32)
    products = tl.zeros((block, token_block), tl.float32)
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        mask = (channel < channels)[:, None] & (token < size)[None, :]
        place = channel[:, None].to(tl.int64) * size + token[None, :]
        normed = (tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) - center[None, :]) * inverse[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        part = parts_ptr + channel * tl.num_programs(0) + tl.program_id(0)
        tl.store(part, tl.sum(grad * normed, 1), mask=channel < channels)
        tl.store(part + channels * tl.num_programs(0), tl.sum(grad, 1), mask=channel < channels)
        grad *= tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
        sums += grad
        products += grad * normed
    total, product = tl.sum(sums, 0) / channels, tl.sum(products, 0) / channels
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        mask = (channel < channels)[:, None] & (token < size)[None, :]
        place = channel[:, None].to(tl.int64) * size + token[None, :]
        normed = (tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) - center[None, :]) * inverse[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad *= tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
        grad = (grad - total[None, :] - normed * product[None, :]) * inverse[None, :]
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton_op('mmstrip_gpu::layer_norm', mutates_args={})
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x (C, N, H, W), mean and inverse standard deviation (N * H * W, )."""
    if not on_card(x):
        variance, mean = torch.var_mean(x.to(wide(x.dtype)).flatten(1), 0, correction=0)
        inverse = (variance + eps).rsqrt()
        y = (x.flatten(1) - mean) * inverse * weight[:, None] + bias[:, None]
        return y.to(x.dtype).view(x.shape), mean, inverse
    y = torch.empty_like(x)
    size = x.shape[1] * x.shape[2] * x.shape[3]
    mean, inverse = (x.new_empty(size, dtype=torch.float32) for _ in range(2))
    launch(_forward)[triton.cdiv(size, TOKENS),](
        x, weight, bias, y, mean, inverse, x.shape[0], size, eps, token_block=TOKENS, block=CHANNELS
    )
    return y, mean, inverse


@triton_op('mmstrip_gpu::layer_norm_backward', mutates_args={})
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and partial sums of the gradients of weight and bias: (2, C, parts)."""
    if not on_card(x):
        normed = (x.flatten(1) - mean) * inverse
        grad = grad.flatten(1).to(normed.dtype)
        parts = torch.stack([(grad * normed).sum(1), grad.sum(1)])[:, :, None]
        grad = grad * weight[:, None]
        grad = (grad - grad.mean(0) - normed * (grad * normed).mean(0)) * inverse
        return grad.to(x.dtype).view(x.shape), parts
    grad_x = torch.empty_like(x)
    size = x.shape[1] * x.shape[2] * x.shape[3]
    programs = triton.cdiv(size, TOKENS)
    parts = x.new_empty((2, x.shape[0], programs), dtype=torch.float32)
    launch(_backward)[programs,](
        grad, x, weight, mean, inverse, grad_x, parts, x.shape[0], size, token_block=TOKENS, block=CHANNELS
    )
    return grad_x, parts


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, inverse = _layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, inverse = ctx.saved_tensors
        grad_x, parts = _layer_norm_backward(grad.contiguous(), x, weight, mean, inverse)
        grad_weight, grad_bias = parts.sum(2).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm of x (C, N, H, W) over its channels."""
    return _LayerNorm.apply(x, norm.weight, norm.bias, norm.eps)
