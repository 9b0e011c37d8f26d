"""LayerNorm over the channels of channel-major maps, without affine part: one kernel forward, one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .kernels import launch, on_card, welford, wide

TOKENS, CHANNELS = 64, 32  # of a program's tile


@triton.jit
def _forward(x_ptr, y_ptr, mean_ptr, inverse_ptr, channels, size, eps, token_block: tl.constexpr, block: tl.constexpr):
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
        y = (x - center[None, :]) * inverse[None, :]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, x_ptr, mean_ptr, inverse_ptr, grad_x_ptr, channels, size,
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
        sums += grad
        products += grad * normed
    total, product = tl.sum(sums, 0) / channels, tl.sum(products, 0) / channels
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        mask = (channel < channels)[:, None] & (token < size)[None, :]
        place = channel[:, None].to(tl.int64) * size + token[None, :]
        normed = (tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) - center[None, :]) * inverse[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad = (grad - total[None, :] - normed * product[None, :]) * inverse[None, :]
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton_op('mmstrip_gpu::layer_norm', mutates_args={})
def _layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (C, N, H, W): normalised, mean and inverse standard deviation (N * H * W, )."""
    if not on_card(x):
        variance, mean = torch.var_mean(x.to(wide(x.dtype)).flatten(1), 0, correction=0)
        inverse = (variance + eps).rsqrt()
        return ((x.flatten(1) - mean) * inverse).to(x.dtype).view(x.shape), mean, inverse
    y = torch.empty_like(x)
    size = x.shape[1] * x.shape[2] * x.shape[3]
    mean, inverse = (x.new_empty(size, dtype=torch.float32) for _ in range(2))
    launch(_forward)[triton.cdiv(size, TOKENS),](
        x, y, mean, inverse, x.shape[0], size, eps, token_block=TOKENS, block=CHANNELS
    )
    return y, mean, inverse


@triton_op('mmstrip_gpu::layer_norm_backward', mutates_args={})
def _layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    if not on_card(x):
        normed = (x.flatten(1) - mean) * inverse
        grad = grad.flatten(1).to(normed.dtype)
        grad = (grad - grad.mean(0) - normed * (grad * normed).mean(0)) * inverse
        return grad.to(x.dtype).view(x.shape)
    grad_x = torch.empty_like(x)
    size = x.shape[1] * x.shape[2] * x.shape[3]
    launch(_backward)[triton.cdiv(size, TOKENS),](
        grad, x, mean, inverse, grad_x, x.shape[0], size, token_block=TOKENS, block=CHANNELS
    )
    return grad_x


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, *_):
    return _layer_norm_backward(grad.contiguous(), *ctx.saved_tensors), None


_layer_norm.register_autograd(_gradient, setup_context=_setup)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """x (C, N, H, W), of mean 0 and variance 1 over its channels."""
    return _layer_norm(x, eps)[0]
