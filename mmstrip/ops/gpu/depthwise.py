"""Depthwise convolutions of channel-major maps (C, N, H, W) as products, by Triton kernels.

Row h of the output is the sum over dy of row h + dy of the input times a band matrix of the weights of dy: some rows
make a product for tensor cores, with one load of the map for each dy instead of one for each weight. The gradient of
the map is the same with the weights flipped, in one launch with that of the weights: sums along the diagonals of
products, over parts of the rows in an order that never changes. Weights may differ between images, as LSMM's sums of
kernels do.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.library import triton_op

from .kernels import PROGRAMS, block_size, launch, on_card, precision, total, wide


@triton.jit
def _convolve(
    x_ptr, weight_ptr, beside_ptr, y_ptr, first_row, group, first_out, rows, height, width, shift,
    side: tl.constexpr, flip: tl.constexpr, has_beside: tl.constexpr, precision: tl.constexpr,
    row_block: tl.constexpr, in_block: tl.constexpr, out_block: tl.constexpr, margin: tl.constexpr,
):  # fmt: skip
    """Convolve some rows of a group: one channel of images that share weights. ``shift``: the output's first group."""
    row = first_row + tl.arange(0, row_block)
    out = first_out + tl.arange(0, out_block)
    token = first_out - margin + tl.arange(0, in_block)
    start = group.to(tl.int64) * rows * width
    h = row % height
    dx = token[:, None] - out[None, :] + side // 2
    band = (dx >= 0) & (dx < side)
    total = tl.zeros((row_block, out_block), tl.float32)
    for dy in range(side):
        other = dy - side // 2
        inside = (row < rows) & (h + other >= 0) & (h + other < height)
        mask = inside[:, None] & ((token >= 0) & (token < width))[None, :]
        x = tl.load(x_ptr + start + (row + other)[:, None] * width + token[None, :], mask=mask, other=0.0)
        cell = dy * side + dx
        if flip:
            cell = side * side - 1 - cell
        weight = tl.load(weight_ptr + group * (side * side) + cell, mask=band, other=0.0)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision=precision)
    mask = (row < rows)[:, None] & (out < width)[None, :]
    place = row[:, None] * width + out[None, :]
    there = (group + shift).to(tl.int64) * rows * width
    tl.store(y_ptr + there + place, total.to(y_ptr.dtype.element_ty), mask=mask)
    if has_beside:
        tl.store(y_ptr + start + place, tl.load(beside_ptr + start + place, mask=mask, other=0.0), mask=mask)


@triton.jit
def _sum_weights(
    grad_ptr, x_ptr, weight_ptr, group, part, dy, groups, rows, height, width, share,
    side: tl.constexpr, precision: tl.constexpr,
    row_block: tl.constexpr, in_block: tl.constexpr, out_block: tl.constexpr, margin: tl.constexpr,
):  # fmt: skip
    """Sum one row of weights, (part, group, dy, dx), over a part of the map's rows."""
    start = group.to(tl.int64) * rows * width
    other = dy - side // 2
    total = tl.zeros((in_block, out_block), tl.float32)
    for first in range(part * share, (part + 1) * share, row_block):
        row = first + tl.arange(0, row_block)
        h = row % height
        ours = (row < rows) & (row < (part + 1) * share)
        inside = ours & (h + other >= 0) & (h + other < height)
        for column in range(0, width, out_block):
            out = column + tl.arange(0, out_block)
            token = column - margin + tl.arange(0, in_block)
            mask = ours[:, None] & (out < width)[None, :]
            grad = tl.load(grad_ptr + start + row[:, None] * width + out[None, :], mask=mask, other=0.0)
            mask = inside[:, None] & ((token >= 0) & (token < width))[None, :]
            x = tl.load(x_ptr + start + (row + other)[:, None] * width + token[None, :], mask=mask, other=0.0)
            total = tl.dot(tl.trans(x), grad, total, input_precision=precision)
    diagonal = tl.arange(0, in_block)[:, None] - margin - tl.arange(0, out_block)[None, :] + side // 2
    cell = ((part * groups + group) * side + dy) * side
    for dx in range(side):
        tl.store(weight_ptr + cell + dx, tl.sum(tl.where(diagonal == dx, total, 0.0)))


@triton.jit
def _forward(
    x_ptr, weight_ptr, beside_ptr, y_ptr, rows, height, width, groups,
    side: tl.constexpr, has_beside: tl.constexpr, precision: tl.constexpr,
    row_block: tl.constexpr, in_block: tl.constexpr, out_block: tl.constexpr, margin: tl.constexpr,
):  # fmt: skip
    rest, blocks = tl.program_id(0), tl.cdiv(rows, row_block)
    group = rest // blocks
    _convolve(
        x_ptr, weight_ptr, beside_ptr, y_ptr, rest % blocks * row_block, group, tl.program_id(1) * out_block,
        rows, height, width, groups if has_beside else 0,
        side, False, has_beside, precision, row_block, in_block, out_block, margin,
    )  # fmt: skip


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, grad_weight_ptr, rows, height, width, groups, share, parts,
    side: tl.constexpr, precision: tl.constexpr,
    row_block: tl.constexpr, in_block: tl.constexpr, out_block: tl.constexpr, margin: tl.constexpr,
):  # fmt: skip
    """Programs for the weights' gradient come first, as they take longer; then those for the map's."""
    program = tl.program_id(0)
    sums = groups * parts * side
    if program < sums:
        rest = program // side
        _sum_weights(
            grad_ptr, x_ptr, grad_weight_ptr, rest // parts, rest % parts, program % side,
            groups, rows, height, width, share, side, precision, row_block, in_block, out_block, margin,
        )  # fmt: skip
    else:
        program -= sums
        blocks = tl.cdiv(rows, row_block)
        rest = program // blocks
        _convolve(
            grad_ptr, weight_ptr, grad_ptr, grad_x_ptr, program % blocks * row_block, rest % groups,
            rest // groups * out_block, rows, height, width, 0,
            side, True, False, precision, row_block, in_block, out_block, margin,
        )  # fmt: skip


def _tile(rows: int, width: int) -> dict[str, int]:
    """Rows and tokens that a program reads and writes; lines that fit one tile need no margin."""
    block = block_size(rows, most=64 if width <= 16 else 32)
    if width <= 32:
        tokens = block_size(width, most=32)
        return dict(row_block=block, in_block=tokens, out_block=tokens, margin=0)
    return dict(row_block=block, in_block=32, out_block=16, margin=8)


@triton_op('mmstrip_gpu::depthwise', mutates_args={})
def _depthwise(x: Tensor, weight: Tensor, beside: Tensor | None) -> Tensor:
    if not on_card(x):
        y = _convolve_by_aten(x, weight)
        return y if beside is None else torch.cat([beside, y])
    channels, images, height, width = x.shape
    y = x if beside is None else x.new_empty((2 * channels, *x.shape[1:]))
    y = torch.empty_like(y)
    groups, rows = channels * weight.shape[1], images // weight.shape[1] * height
    tile = _tile(rows, width)
    grid = groups * triton.cdiv(rows, tile['row_block']), triton.cdiv(width, tile['out_block'])
    launch(_forward)[grid](
        x, weight, x if beside is None else beside, y, rows, height, width, groups,
        side=weight.shape[-1], has_beside=beside is not None, precision=precision(x), **tile,
    )  # fmt: skip
    return y


@triton_op('mmstrip_gpu::depthwise_backward', mutates_args={})
def _depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and partial sums of the weight's, in at least float32."""
    if not on_card(x):
        return _convolve_by_aten(grad, weight.flip(2, 3)), _sum_weights_by_aten(grad, x, *weight.shape[1:3])
    channels, images, height, width = x.shape
    side = weight.shape[-1]
    groups, rows = channels * weight.shape[1], images // weight.shape[1] * height
    tile = _tile(rows, width)
    parts = min(triton.cdiv(PROGRAMS, groups * side), triton.cdiv(rows, tile['row_block']))
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty((parts, *weight.shape), dtype=torch.float32)
    programs = triton.cdiv(rows, tile['row_block']) * triton.cdiv(width, tile['out_block'])
    launch(_backward)[groups * (parts * side + programs),](
        grad, x, weight, grad_x, grad_weight, rows, height, width, groups, triton.cdiv(rows, parts), parts,
        side=side, precision=precision(x), **tile,
    )  # fmt: skip
    return grad_x, grad_weight


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(C, M * n, H, W) as (n, C * M, H, W)."""
    return x.unflatten(1, (groups, -1)).permute(2, 0, 1, 3, 4).flatten(1, 2)


def _convolve_by_aten(x: Tensor, weight: Tensor) -> Tensor:
    channels, groups, side, _ = weight.shape
    weight = weight.reshape(channels * groups, 1, side, side).to(x.dtype)
    y = F.conv2d(_grouped(x, groups), weight, padding=side // 2, groups=channels * groups)
    return y.unflatten(1, (channels, groups)).permute(1, 2, 0, 3, 4).flatten(1, 2).contiguous()


def _sum_weights_by_aten(grad: Tensor, x: Tensor, groups: int, side: int) -> Tensor:
    grad, x = (_grouped(m.to(wide(m.dtype)), groups) for m in (grad, x))
    shape = x.shape[1], 1, side, side
    weight = torch.nn.grad.conv2d_weight(x, shape, grad, padding=side // 2, groups=x.shape[1])
    return weight.reshape(1, -1, groups, side, side)


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, weight, beside):
        ctx.save_for_backward(x, weight)
        ctx.beside = beside is not None
        return _depthwise(x, weight, beside)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, beside = grad.contiguous(), None
        if ctx.beside:
            beside, grad = grad.chunk(2)
        grad_x, parts = _depthwise_backward(grad, x, weight)
        return grad_x, total(parts).to(weight.dtype), beside


def depthwise(x: Tensor, weight: Tensor, beside: Tensor | None = None) -> Tensor:
    """Convolve x (C, N, H, W) with weight (C, M, K, K), K odd and at most 17, M being 1 or, with weights for each
    image, N; zeros stand around the map. With a map ``beside`` it, of the shape of x, that comes first: (2 C, N, H, W).
    """
    return _Depthwise.apply(x, weight, beside)
