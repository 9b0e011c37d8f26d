"""The strip layer's sum (Section 3.2) of channel-major maps (C, N, H, W), by a Triton kernel for both axes.

A line is a row or a column: two strides tell them apart, so no map is transposed. Each program takes some lines of one
channel as a product on tensor cores; the gradient of the map is the same kernel with the weights transposed and the
strip reversed. The gradient of the weights comes as sums over parts of the lines, in an order that never changes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .kernels import launch, on_card, power_of_two, precision

LINES = 64  # of a program
PROGRAMS = 1024  # that the gradient of the weights is shared between, at least where there are lines enough


@triton.jit
def _mix(
    x_ptr, weight_ptr, bias_ptr, position_ptr, y_ptr,
    patches, images, lines, tokens, line_stride, token_stride,
    strip: tl.constexpr, backward: tl.constexpr, has_bias: tl.constexpr, has_position: tl.constexpr, precision: tl.constexpr,
    line_block: tl.constexpr, token_block: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1).to(tl.int64)
    patch = channel % patches
    line = tl.program_id(0) * line_block + tl.arange(0, line_block)
    image, inner = line // lines, line % lines
    size = lines * tokens
    start = channel * images * size + image * size
    out = tl.program_id(2) * token_block + tl.arange(0, token_block)
    total = tl.zeros((line_block, token_block), tl.float32)
    for k in range(strip):
        other = inner + k - strip // 2
        inside = (line < images * lines) & (other >= 0) & (other < lines)
        for first in range(0, tokens, token_block):
            token = first + tl.arange(0, token_block)
            mask = inside[:, None] & (token < tokens)[None, :]
            place = other[:, None] * line_stride + token[None, :] * token_stride
            x = tl.load(x_ptr + start[:, None] + place, mask=mask, other=0.0)
            if has_position:
                x += tl.load(position_ptr + channel * size + place, mask=mask, other=0.0).to(x.dtype)
            if backward:  # (in, out) of the gradient are (out, in) of the layer
                cell = ((patch * strip + strip - 1 - k) * tokens + token[:, None]) * tokens + out[None, :]
            else:
                cell = ((patch * strip + k) * tokens + out[None, :]) * tokens + token[:, None]
            weight = tl.load(weight_ptr + cell, mask=(token < tokens)[:, None] & (out < tokens)[None, :], other=0.0)
            total = tl.dot(x, weight.to(x.dtype), total, input_precision=precision)
    if has_bias:
        total += tl.load(bias_ptr + patch * tokens + out, mask=out < tokens, other=0.0).to(tl.float32)[None, :]
    place = start[:, None] + inner[:, None] * line_stride + out[None, :] * token_stride
    mask = (line < images * lines)[:, None] & (out < tokens)[None, :]
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(
    grad_ptr, x_ptr, position_ptr, weight_ptr, bias_ptr,
    patches, images, lines, tokens, line_stride, token_stride, channels, share,
    strip: tl.constexpr, has_position: tl.constexpr, precision: tl.constexpr, line_block: tl.constexpr, token_block: tl.constexpr,
):  # fmt: skip
    """Sums over a share of the lines of all channels of a patch: (share, patch, k, out, in) and (share, patch, out)."""
    patch, k, part = tl.program_id(0) // strip, tl.program_id(0) % strip, tl.program_id(1)
    tiles = tl.cdiv(tokens, token_block)
    out = (tl.program_id(2) // tiles) * token_block + tl.arange(0, token_block)
    token = (tl.program_id(2) % tiles) * token_block + tl.arange(0, token_block)
    size, count = lines * tokens, images * lines
    total = tl.zeros((token_block, token_block), tl.float32)
    bias = tl.zeros((token_block,), tl.float32)
    for channel in range(patch, channels, patches):
        for first in range(part * share, (part + 1) * share, line_block):
            line = first + tl.arange(0, line_block)
            image, inner = line // lines, line % lines
            other = inner + k - strip // 2
            start = channel.to(tl.int64) * images * size + image * size
            ours = (line < count) & (line < (part + 1) * share)
            place = start[:, None] + inner[:, None] * line_stride + out[None, :] * token_stride
            grad = tl.load(grad_ptr + place, mask=ours[:, None] & (out < tokens)[None, :], other=0.0)
            mask = (ours & (other >= 0) & (other < lines))[:, None] & (token < tokens)[None, :]
            place = other[:, None] * line_stride + token[None, :] * token_stride
            x = tl.load(x_ptr + start[:, None] + place, mask=mask, other=0.0)
            if has_position:
                x += tl.load(position_ptr + channel.to(tl.int64) * size + place, mask=mask, other=0.0).to(x.dtype)
            total = tl.dot(tl.trans(grad), x, total, input_precision=precision)
            bias += tl.sum(grad.to(tl.float32), 0)
    row = part * patches + patch
    cell = ((row * strip + k) * tokens + out[:, None]) * tokens + token[None, :]
    tl.store(weight_ptr + cell, total, mask=(out < tokens)[:, None] & (token < tokens)[None, :])
    if (k == 0) & (tl.program_id(2) % tiles == 0):
        tl.store(bias_ptr + row * tokens + out, bias, mask=out < tokens)


def _layout(x: Tensor, row: bool) -> tuple[int, int, int, int]:
    """Lines and tokens of an image, and the strides between them."""
    height, width = x.shape[2:]
    return (height, width, width, 1) if row else (width, height, 1, width)


@triton_op('mmstrip_gpu::strips', mutates_args={})
def strips(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, row: bool, backward: bool = False
) -> Tensor:
    """Strips of x (C, N, H, W) plus positions (C, H, W), weights (G, S, L, L) and bias (G, L); or their transpose."""
    if not on_card(x):
        return _strips_by_aten(x, weight, bias, position, row, backward)
    y = torch.empty_like(x)
    lines, tokens, *strides = _layout(x, row)
    channels, images = x.shape[:2]
    block = power_of_two(tokens, 16, 64)
    grid = triton.cdiv(images * lines, LINES), channels, triton.cdiv(tokens, block)
    launch(_mix)[grid](
        x, weight, x if bias is None else bias, x if position is None else position, y,
        weight.shape[0], images, lines, tokens, *strides,
        strip=weight.shape[1], backward=backward, has_bias=bias is not None, has_position=position is not None,
        precision=precision(x), line_block=LINES, token_block=block,
    )  # fmt: skip
    return y


@triton_op('mmstrip_gpu::strips_weight', mutates_args={})
def strips_weight(
    grad: Tensor, x: Tensor, position: Tensor | None, patches: int, strip: int, row: bool
) -> tuple[Tensor, Tensor]:
    """Parts of the gradients of weights and bias, in float32: their sums over the first axis are the gradients."""
    if not on_card(x):
        return _gradient_by_aten(grad, x, position, patches, strip, row)
    lines, tokens, *strides = _layout(x, row)
    channels, images = x.shape[:2]
    block = power_of_two(tokens, 16, 64)
    tiles = triton.cdiv(tokens, block) ** 2
    parts = min(triton.cdiv(PROGRAMS, patches * strip * tiles), triton.cdiv(images * lines, LINES))
    share = triton.cdiv(images * lines, parts)
    weight = x.new_empty((parts, patches, strip, tokens, tokens), dtype=torch.float32)
    bias = x.new_empty((parts, patches, tokens), dtype=torch.float32)
    launch(_gradient)[patches * strip, parts, tiles](
        grad, x, x if position is None else position, weight, bias,
        patches, images, lines, tokens, *strides, channels, share,
        strip=strip, has_position=position is not None, precision=precision(x), line_block=LINES, token_block=block,
    )  # fmt: skip
    return weight, bias


def _lines(x: Tensor, row: bool, patches: int) -> Tensor:
    """(C, N, H, W) as what a grouped convolution over lines takes: (N * C / G, G * tokens, lines)."""
    x = x.transpose(2, 3) if row else x
    return x.unflatten(0, (-1, patches)).permute(2, 0, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def _strips_by_aten(x, weight, bias, position, row, backward):
    patches, strip = weight.shape[:2]
    weight = weight.flip(1).transpose(2, 3) if backward else weight
    x = x if position is None else x + position.to(x.dtype)[:, None]
    kernel = weight.permute(0, 2, 3, 1).flatten(0, 1).to(x.dtype)
    bias = None if bias is None else bias.flatten().to(x.dtype)
    y = F.conv1d(_lines(x, row, patches), kernel, bias, padding=strip // 2, groups=patches)
    tokens, lines = weight.shape[2], y.shape[2]
    y = y.reshape(x.shape[1], -1, patches, tokens, lines).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return (y.transpose(2, 3) if row else y).contiguous()


def _gradient_by_aten(grad, x, position, patches, strip, row):
    x = x if position is None else x + position.to(x.dtype)[:, None]
    wide = torch.promote_types(x.dtype, torch.float32)
    grad, x = (_lines(m.to(wide), row, patches).unflatten(1, (patches, -1)) for m in (grad, x))
    x, count = F.pad(x, (strip // 2, strip // 2)), x.shape[-1]
    weight = torch.stack([torch.einsum('mgol,mgil->goi', grad, x[..., k : k + count]) for k in range(strip)], dim=1)
    return weight[None], grad.sum((0, 3))[None]


def _setup(ctx, inputs, output):
    x, weight, bias, position, ctx.row, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, bias, position)


def _backward(ctx, grad):
    x, weight, bias, position = ctx.saved_tensors
    assert not ctx.transposed, 'second derivatives are not ours'
    grad = grad.contiguous()
    grad_x = strips(grad, weight, None, None, ctx.row, True)
    parts, bias_parts = strips_weight(grad, x, position, weight.shape[0], weight.shape[1], ctx.row)
    grad_bias = None if bias is None else bias_parts.sum(0).to(bias.dtype)
    grad_position = None if position is None else grad_x.sum(1, dtype=parts.dtype).to(position.dtype)
    return grad_x, parts.sum(0).to(weight.dtype), grad_bias, grad_position, None, None


strips.register_autograd(_backward, setup_context=_setup)
