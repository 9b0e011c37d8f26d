"""The strip layer's sum (Section 3.2) of channel-major maps (C, N, H, W), by Triton kernels for both axes.

A line is a row or a column: two strides tell them apart, so no map is transposed. A program takes some lines of one
channel as a product on tensor cores, and adds the relative positions as it reads. The gradient of the map is the same
with the weights transposed and the strip reversed, in one launch with the gradient of the weights, which comes as sums
over parts of the lines, in an order that never changes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.library import triton_op

from ...models.strip_mixing import RelativePosition, StripMLPLayer
from .kernels import PROGRAMS, block_size, launch, on_card, precision, total, wide

LINES = 64  # per program
LARGEST_MAP = 64  # side; the gradient of the positions of larger maps is left to ATen


@triton.jit
def _positions(table_ptr, channel, channels, line, token, mask, span, is_row: tl.constexpr):
    offset = token[None, :] - line[:, None] if is_row else line[:, None] - token[None, :]  # column minus row
    offset = tl.minimum(tl.maximum(offset + span, 0), 2 * span)
    return tl.load(table_ptr + offset * channels + channel, mask=mask, other=0.0)


@triton.jit
def _mix(
    x_ptr, weight_ptr, bias_ptr, table_ptr, beside_ptr, y_ptr, first_line, channel, first_out,
    channels, patches, images, lines, tokens, line_stride, token_stride, span, shift, beside_shift,
    strip: tl.constexpr, is_row: tl.constexpr, backward: tl.constexpr, has_bias: tl.constexpr,
    has_table: tl.constexpr, has_beside: tl.constexpr, precision: tl.constexpr,
    line_block: tl.constexpr, token_block: tl.constexpr,
):  # fmt: skip
    """Mix some lines of a channel; shifts: first output channels of the sums, and of the map beside them."""
    patch = channel % patches
    line = first_line + tl.arange(0, line_block)
    out = first_out + tl.arange(0, token_block)
    inner, image, size = line % lines, line // lines, lines * tokens
    start = (channel.to(tl.int64) * images + image) * size
    total = tl.zeros((line_block, token_block), tl.float32)
    for k in range(strip):
        other = inner + k - strip // 2
        inside = (line < images * lines) & (other >= 0) & (other < lines)
        for first in range(0, tokens, token_block):
            token = first + tl.arange(0, token_block)
            mask = inside[:, None] & (token < tokens)[None, :]
            place = start[:, None] + other[:, None] * line_stride + token[None, :] * token_stride
            x = tl.load(x_ptr + place, mask=mask, other=0.0)
            if has_table:
                x += _positions(table_ptr, channel, channels, other, token, mask, span, is_row).to(x.dtype)
            if backward:  # (in, out) of the gradient are (out, in) of the layer
                cell = ((patch * strip + strip - 1 - k) * tokens + token[:, None]) * tokens + out[None, :]
            else:
                cell = ((patch * strip + k) * tokens + out[None, :]) * tokens + token[:, None]
            weight = tl.load(weight_ptr + cell, mask=(token < tokens)[:, None] & (out < tokens)[None, :], other=0.0)
            total = tl.dot(x, weight.to(x.dtype), total, input_precision=precision)
    if has_bias:
        total += tl.load(bias_ptr + patch * tokens + out, mask=out < tokens, other=0.0).to(tl.float32)[None, :]
    place = inner[:, None] * line_stride + out[None, :] * token_stride
    mask = (line < images * lines)[:, None] & (out < tokens)[None, :]
    there = ((channel + shift).to(tl.int64) * images + image) * size
    tl.store(y_ptr + there[:, None] + place, total.to(y_ptr.dtype.element_ty), mask=mask)
    if has_beside:
        beside = tl.load(beside_ptr + start[:, None] + place, mask=mask, other=0.0)
        there = ((channel + beside_shift).to(tl.int64) * images + image) * size
        tl.store(y_ptr + there[:, None] + place, beside, mask=mask)


@triton.jit
def _sum_weights(
    grad_ptr, x_ptr, table_ptr, sums_ptr, row, part, tile,
    channels, patches, images, lines, tokens, line_stride, token_stride, span, share,
    strip: tl.constexpr, is_row: tl.constexpr, has_table: tl.constexpr, precision: tl.constexpr,
    line_block: tl.constexpr, token_block: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the lines of a patch: per part (patch, k, out, in), then (patch, out)."""
    patch, k = row // strip, row % strip
    tiles = tl.cdiv(tokens, token_block)
    out = (tile // tiles) * token_block + tl.arange(0, token_block)
    token = (tile % tiles) * token_block + tl.arange(0, token_block)
    size, count = lines * tokens, images * lines
    total = tl.zeros((token_block, token_block), tl.float32)
    bias = tl.zeros((token_block,), tl.float32)
    for i in range(channels // patches):
        channel = patch + i * patches
        for first in range(part * share, (part + 1) * share, line_block):
            line = first + tl.arange(0, line_block)
            inner = line % lines
            other = inner + k - strip // 2
            start = (channel.to(tl.int64) * images + line // lines) * size
            ours = (line < count) & (line < (part + 1) * share)
            place = start[:, None] + inner[:, None] * line_stride + out[None, :] * token_stride
            grad = tl.load(grad_ptr + place, mask=ours[:, None] & (out < tokens)[None, :], other=0.0)
            mask = (ours & (other >= 0) & (other < lines))[:, None] & (token < tokens)[None, :]
            place = start[:, None] + other[:, None] * line_stride + token[None, :] * token_stride
            x = tl.load(x_ptr + place, mask=mask, other=0.0)
            if has_table:
                x += _positions(table_ptr, channel, channels, other, token, mask, span, is_row).to(x.dtype)
            total = tl.dot(tl.trans(grad), x, total, input_precision=precision)
            bias += tl.sum(grad.to(tl.float32), 0)
    weights = patches * strip * tokens * tokens
    sums_ptr += part * (weights + patches * tokens)
    cell = ((patch * strip + k) * tokens + out[:, None]) * tokens + token[None, :]
    tl.store(sums_ptr + cell, total, mask=(out < tokens)[:, None] & (token < tokens)[None, :])
    if (k == 0) & (tile % tiles == 0):
        tl.store(sums_ptr + weights + patch * tokens + out, bias, mask=out < tokens)


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, table_ptr, beside_ptr, y_ptr,
    channels, patches, images, lines, tokens, line_stride, token_stride, span, shift, beside_shift,
    strip: tl.constexpr, is_row: tl.constexpr, has_table: tl.constexpr, has_beside: tl.constexpr,
    precision: tl.constexpr, line_block: tl.constexpr, token_block: tl.constexpr,
):  # fmt: skip
    _mix(
        x_ptr, weight_ptr, bias_ptr, table_ptr, beside_ptr, y_ptr,
        tl.program_id(0) * line_block, tl.program_id(1), tl.program_id(2) * token_block,
        channels, patches, images, lines, tokens, line_stride, token_stride, span, shift, beside_shift,
        strip, is_row, False, True, has_table, has_beside, precision, line_block, token_block,
    )  # fmt: skip


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, table_ptr, grad_x_ptr, sums_ptr,
    channels, patches, images, lines, tokens, line_stride, token_stride, span, share, parts,
    strip: tl.constexpr, is_row: tl.constexpr, has_table: tl.constexpr,
    precision: tl.constexpr, line_block: tl.constexpr, token_block: tl.constexpr,
):  # fmt: skip
    """Programs for the weights' gradient come first, as they take longer; then those for the map's."""
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, token_block)
    first = patches * strip * parts * tiles * tiles
    if program < first:
        tile, rest = program % (tiles * tiles), program // (tiles * tiles)
        _sum_weights(
            grad_ptr, x_ptr, table_ptr, sums_ptr, rest // parts, rest % parts, tile,
            channels, patches, images, lines, tokens, line_stride, token_stride, span, share,
            strip, is_row, has_table, precision, line_block, token_block,
        )  # fmt: skip
    else:
        program -= first
        blocks = tl.cdiv(images * lines, line_block)
        rest = program // blocks
        _mix(
            grad_ptr, weight_ptr, weight_ptr, table_ptr, grad_ptr, grad_x_ptr,
            program % blocks * line_block, rest % channels, rest // channels * token_block,
            channels, patches, images, lines, tokens, line_stride, token_stride, span, 0, 0,
            strip, is_row, True, False, False, False, precision, line_block, token_block,
        )  # fmt: skip


@triton.jit
def _sum_positions(
    grad_ptr, table_ptr, channels, images, height, width, span,
    row_block: tl.constexpr, column_block: tl.constexpr,
):  # fmt: skip
    """One channel's column of the gradient of a position table."""
    channel = tl.program_id(0)
    row, column = tl.arange(0, row_block)[:, None], tl.arange(0, column_block)[None, :]
    mask = (row < height) & (column < width)
    total = tl.zeros((row_block, column_block), tl.float32)
    for image in range(images):
        start = (channel.to(tl.int64) * images + image) * height * width
        total += tl.load(grad_ptr + start + row * width + column, mask=mask, other=0.0).to(tl.float32)
    offset = tl.minimum(tl.maximum(column - row + span, 0), 2 * span)
    for i in range(2 * span + 1):
        tl.store(table_ptr + i * channels + channel, tl.sum(tl.where(mask & (offset == i), total, 0.0)))


def _layout(x: Tensor, row: bool) -> tuple[int, int, int, int]:
    """Lines and tokens of an image, and the strides between them."""
    height, width = x.shape[2:]
    return (height, width, width, 1) if row else (width, height, 1, width)


def _warps(block: int) -> int:
    """Warps that keep a program's tiles in registers."""
    return 4 if block == 16 else 8


@triton_op('mmstrip_gpu::strips', mutates_args={})
def _strips(
    x: Tensor, weight: Tensor, bias: Tensor, table: Tensor | None, beside: Tensor | None, row: bool, before: bool
) -> Tensor:
    if not on_card(x):
        y = _mix_by_aten(x if table is None else x + _expand(table, x), weight, bias, row)
        return y if beside is None else torch.cat([beside, y] if before else [y, beside])
    channels, images = x.shape[:2]
    y = x if beside is None else x.new_empty((2 * channels, *x.shape[1:]))
    y = torch.empty_like(y)
    lines, tokens, *strides = _layout(x, row)
    block = block_size(tokens, most=32)  # larger blocks spill registers
    grid = triton.cdiv(images * lines, LINES), channels, triton.cdiv(tokens, block)
    launch(_forward)[grid](
        x, weight, bias, x if table is None else table, x if beside is None else beside, y,
        channels, weight.shape[0], images, lines, tokens, *strides, 0 if table is None else table.shape[0] // 2,
        channels if before else 0, 0 if before else channels,
        strip=weight.shape[1], is_row=row, has_table=table is not None, has_beside=beside is not None,
        precision=precision(x), line_block=LINES, token_block=block, num_warps=_warps(block),
    )  # fmt: skip
    return y


@triton_op('mmstrip_gpu::strips_backward', mutates_args={})
def _strips_backward(grad: Tensor, x: Tensor, weight: Tensor, table: Tensor | None, row: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x, and partial sums for weight, then bias, in at least float32."""
    if not on_card(x):
        grad_x = _mix_by_aten(grad, weight.flip(1).transpose(2, 3), None, row)
        parts = _sum_weights_by_aten(grad, x if table is None else x + _expand(table, x), *weight.shape[:2], row)
        return grad_x, torch.cat([part.flatten() for part in parts])[None]
    patches, strip = weight.shape[:2]
    channels, images = x.shape[:2]
    lines, tokens, *strides = _layout(x, row)
    block = block_size(tokens, most=32)  # larger blocks spill registers
    tiles = triton.cdiv(tokens, block)
    blocks = triton.cdiv(images * lines, LINES)
    parts = min(triton.cdiv(PROGRAMS, patches * strip * tiles * tiles), blocks)
    grad_x = torch.empty_like(x)
    sums = x.new_empty((parts, weight.numel() + patches * tokens), dtype=torch.float32)
    launch(_backward)[patches * strip * parts * tiles * tiles + blocks * channels * tiles,](
        grad, x, weight, x if table is None else table, grad_x, sums,
        channels, patches, images, lines, tokens, *strides, 0 if table is None else table.shape[0] // 2,
        triton.cdiv(images * lines, parts), parts,
        strip=strip, is_row=row, has_table=table is not None,
        precision=precision(x), line_block=LINES, token_block=block, num_warps=_warps(block),
    )  # fmt: skip
    return grad_x, sums


@triton_op('mmstrip_gpu::position_gradient', mutates_args={})
def _position_gradient(grad: Tensor, rows: int) -> Tensor:
    """The gradient of a position table (rows, C), from that of the map it was added to."""
    channels, images, height, width = grad.shape
    if not on_card(grad) or max(height, width) > LARGEST_MAP:
        offset = _offsets(rows, grad).flatten() == torch.arange(rows, device=grad.device)[:, None]
        sums = grad.sum(1, dtype=wide(grad.dtype)).flatten(1)
        return (sums @ offset.t().to(sums.dtype)).t().contiguous()
    table = grad.new_empty((rows, channels), dtype=torch.float32)
    launch(_sum_positions)[channels,](
        grad, table, channels, images, height, width, rows // 2,
        row_block=block_size(height), column_block=block_size(width), num_warps=8,
    )  # fmt: skip
    return table


def _offsets(rows: int, x: Tensor) -> Tensor:
    """(H, W): the row of a position table for each token."""
    row, column = (torch.arange(side, device=x.device) for side in x.shape[2:])
    return (column - row[:, None] + rows // 2).clamp(0, rows - 1)


def _expand(table: Tensor, x: Tensor) -> Tensor:
    """The position embedding of x: (C, 1, H, W)."""
    return table.t()[:, None, _offsets(table.shape[0], x)].to(x.dtype)


def _lines(x: Tensor, row: bool, patches: int) -> Tensor:
    """(C, N, H, W) as input of a grouped convolution over lines: (N * C / G, G * tokens, lines)."""
    x = x.transpose(2, 3) if row else x
    return x.unflatten(0, (-1, patches)).permute(2, 0, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def _mix_by_aten(x: Tensor, weight: Tensor, bias: Tensor | None, row: bool) -> Tensor:
    patches, strip, tokens, _ = weight.shape
    kernel = weight.permute(0, 2, 3, 1).flatten(0, 1).to(x.dtype)
    bias = None if bias is None else bias.flatten().to(x.dtype)
    y = F.conv1d(_lines(x, row, patches), kernel, bias, padding=strip // 2, groups=patches)
    y = y.reshape(x.shape[1], -1, patches, tokens, y.shape[2]).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return (y.transpose(2, 3) if row else y).contiguous()


def _sum_weights_by_aten(grad: Tensor, x: Tensor, patches: int, strip: int, row: bool) -> tuple[Tensor, Tensor]:
    grad, x = (_lines(m.to(wide(m.dtype)), row, patches).unflatten(1, (patches, -1)) for m in (grad, x))
    count, x = x.shape[-1], F.pad(x, (strip // 2, strip // 2))
    weight = [torch.einsum('mgol,mgil->goi', grad, x[..., k : k + count]) for k in range(strip)]
    return torch.stack(weight, dim=1), grad.sum((0, 3))


class _Strips(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, table, beside, is_beside_itself, row, before):
        ctx.save_for_backward(x, weight, bias, table)
        ctx.row, ctx.before, ctx.beside, ctx.is_beside_itself = row, before, beside is not None, is_beside_itself
        return _strips(x, weight, bias, table, x if is_beside_itself else beside, row, before)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, table = ctx.saved_tensors
        grad, beside = grad.contiguous(), None
        if ctx.beside or ctx.is_beside_itself:
            grad, beside = grad.chunk(2)[:: -1 if ctx.before else 1]
        grad_x, parts = _strips_backward(grad, x, weight, table, ctx.row)
        grad_weight, grad_bias = total(parts).split([weight.numel(), bias.numel()])
        grad_table = None
        if table is not None:
            grad_table = _position_gradient(grad_x, table.shape[0]).to(table.dtype)
        grad_weight, grad_bias = grad_weight.view_as(weight).to(weight.dtype), grad_bias.view_as(bias).to(bias.dtype)
        if ctx.is_beside_itself:
            grad_x, beside = grad_x + beside, None
        return grad_x, grad_weight, grad_bias, grad_table, beside, None, None, None


def strips(
    layer: StripMLPLayer, x: Tensor, position: RelativePosition, beside: Tensor | None = None, before: bool = False
) -> Tensor:
    """A strip layer of x (C, N, H, W) plus positions.

    With a map ``beside`` it, of the shape of x, the result is (2 C, N, H, W): that map ``before`` the sums, or after.
    """
    is_itself = beside is x  # compilers lose a gradient if one tensor is passed twice
    beside = None if is_itself else beside
    return _Strips.apply(x, layer.weight, layer.bias, position.table, beside, is_itself, layer.axis == 'row', before)
