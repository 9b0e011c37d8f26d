"""Depthwise convolutions of channel-major maps (C, N, H, W) as products, by a Triton kernel.

Row h of the output is the sum over dy of row h + dy of the input times a band matrix of the weights of dy: some rows
make a product for tensor cores, with one load of the map for each dy instead of one for each weight. The gradient of
the map is the same with the weights flipped; that of the weights sums the diagonals of products, over parts of the
rows in an order that never changes. Weights may differ between images, as LSMM's sums of kernels do.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .kernels import launch, on_card, power_of_two, precision

PROGRAMS = 1024


@triton.jit
def _convolve(
    x_ptr, weight_ptr, y_ptr, rows, height, width, groups,
    side: tl.constexpr, flip: tl.constexpr, precision: tl.constexpr,
    row_block: tl.constexpr, in_block: tl.constexpr, out_block: tl.constexpr, margin: tl.constexpr,
):  # fmt: skip
    """Rows of a channel and of a group of images, which share their weights."""
    group = tl.program_id(1).to(tl.int64)  # channel * groups + group of images
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    out = tl.program_id(2) * out_block + tl.arange(0, out_block)
    token = tl.program_id(2) * out_block - margin + tl.arange(0, in_block)
    start = group * rows * width
    h = row % height
    dx = token[:, None] - out[None, :] + side // 2
    band = (dx >= 0) & (dx < side)
    total = tl.zeros((row_block, out_block), tl.float32)
    for dy in range(side):
        shift = dy - side // 2
        inside = (row < rows) & (h + shift >= 0) & (h + shift < height)
        mask = inside[:, None] & ((token >= 0) & (token < width))[None, :]
        x = tl.load(x_ptr + start + (row + shift)[:, None] * width + token[None, :], mask=mask, other=0.0)
        cell = dy * side + dx
        if flip:
            cell = side * side - 1 - cell
        weight = tl.load(weight_ptr + group * (side * side) + cell, mask=band, other=0.0)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision=precision)
    mask = (row < rows)[:, None] & (out < width)[None, :]
    tl.store(y_ptr + start + row[:, None] * width + out[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(
    grad_ptr, x_ptr, weight_ptr, rows, height, width, share,
    side: tl.constexpr, precision: tl.constexpr,
    row_block: tl.constexpr, in_block: tl.constexpr, out_block: tl.constexpr, margin: tl.constexpr,
):  # fmt: skip
    """Sums over a share of the rows: one row of weights (share, group, dy)."""
    group, part, dy = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start = group * rows * width
    shift = dy - side // 2
    total = tl.zeros((in_block, out_block), tl.float32)
    for first in range(part * share, (part + 1) * share, row_block):
        row = first + tl.arange(0, row_block)
        h = row % height
        ours = (row < rows) & (row < (part + 1) * share)
        inside = ours & (h + shift >= 0) & (h + shift < height)
        for column in range(0, width, out_block):
            out = column + tl.arange(0, out_block)
            token = column - margin + tl.arange(0, in_block)
            mask = ours[:, None] & (out < width)[None, :]
            grad = tl.load(grad_ptr + start + row[:, None] * width + out[None, :], mask=mask, other=0.0)
            mask = inside[:, None] & ((token >= 0) & (token < width))[None, :]
            x = tl.load(x_ptr + start + (row + shift)[:, None] * width + token[None, :], mask=mask, other=0.0)
            total = tl.dot(tl.trans(x), grad, total, input_precision=precision)
    diagonal = tl.arange(0, in_block)[:, None] - margin - tl.arange(0, out_block)[None, :] + side // 2
    cell = ((part * tl.num_programs(0) + group) * side + dy) * side
    for dx in range(side):
        tl.store(weight_ptr + cell + dx, tl.sum(tl.where(diagonal == dx, total, 0.0)))


def _tile(width: int) -> dict[str, int]:
    """Tokens of a row that a program reads and writes; lines of one tile need no margin."""
    if width <= 32:
        tokens = power_of_two(width, 16, 32)
        return dict(in_block=tokens, out_block=tokens, margin=0)
    return dict(in_block=32, out_block=16, margin=8)


@triton_op('mmstrip_gpu::depthwise', mutates_args={})
def depthwise(x: Tensor, weight: Tensor, flip: bool = False) -> Tensor:
    """Convolve x (C, N, H, W) with weight (C, M, K, K), K odd and at most 17, M being 1 or, with weights for each
    image, N; zeros stand around the map."""
    if not on_card(x):
        return _convolve_by_aten(x, weight, flip)
    y = torch.empty_like(x)
    channels, images, height, width = x.shape
    groups = weight.shape[1]
    rows = images // groups * height
    block = power_of_two(rows, 16, 64)
    tile = _tile(width)
    grid = triton.cdiv(rows, block), channels * groups, triton.cdiv(width, tile['out_block'])
    launch(_convolve)[grid](
        x, weight, y, rows, height, width, groups,
        side=weight.shape[-1], flip=flip, precision=precision(x), row_block=block, **tile,
    )  # fmt: skip
    return y


@triton_op('mmstrip_gpu::depthwise_weight', mutates_args={})
def depthwise_weight(grad: Tensor, x: Tensor, groups: int, side: int) -> Tensor:
    """Parts of the weights' gradient, in float32: the sum over the first axis is (C, M, K, K)."""
    if not on_card(x):
        return _gradient_by_aten(grad, x, groups, side)
    channels, images, height, width = x.shape
    rows = images // groups * height
    block = power_of_two(rows, 16, 64)
    parts = min(triton.cdiv(PROGRAMS, channels * groups * side), triton.cdiv(rows, block))
    weight = x.new_empty((parts, channels, groups, side, side), dtype=torch.float32)
    launch(_gradient)[channels * groups, parts, side](
        grad, x, weight, rows, height, width, triton.cdiv(rows, parts),
        side=side, precision=precision(x), row_block=block, **_tile(width),
    )  # fmt: skip
    return weight


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(C, M * n, H, W) as (n, C * M, H, W)."""
    return x.unflatten(1, (groups, -1)).permute(2, 0, 1, 3, 4).flatten(1, 2)


def _convolve_by_aten(x, weight, flip):
    weight = weight.flip(2, 3) if flip else weight
    channels, groups, side, _ = weight.shape
    weight = weight.reshape(channels * groups, 1, side, side).to(x.dtype)
    y = F.conv2d(_grouped(x, groups), weight, padding=side // 2, groups=channels * groups)
    return y.unflatten(1, (channels, groups)).permute(1, 2, 0, 3, 4).flatten(1, 2).contiguous()


def _gradient_by_aten(grad, x, groups, side):
    wide = torch.promote_types(x.dtype, torch.float32)
    grad, x = (_grouped(m.to(wide), groups) for m in (grad, x))
    weight = torch.nn.grad.conv2d_weight(x, (x.shape[1], 1, side, side), grad, padding=side // 2, groups=x.shape[1])
    return weight.reshape(1, -1, groups, side, side)


def _setup(ctx, inputs, output):
    x, weight, ctx.flip = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    assert not ctx.flip, 'second derivatives are not ours'
    grad = grad.contiguous()
    grad_weight = depthwise_weight(grad, x, weight.shape[1], weight.shape[-1]).sum(0).to(weight.dtype)
    return depthwise(grad, weight, True), grad_weight, None


depthwise.register_autograd(_backward, setup_context=_setup)
