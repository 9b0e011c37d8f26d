"""LSMM as one convolution: a * tall + b * wide + c * u is one 7x7 kernel for each image and channel.

The average of tall + wide + u needs neither map: it is a sum of u, each token weighted by how the two kernels read it.
What draws a, b and c from the averages is a program an image.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.library import triton_op

from ...models.strip_mixing import LocalStripMixing
from ..local_strips import FastLocalStripMixing
from .depthwise import _depthwise, _depthwise_backward
from .formula import is_stock
from .kernels import PROGRAMS, block_size, gelu, gelu_slope, launch, on_card, total, wide

IMAGES = 8  # per program that averages
CHANNELS, TAPS = 32, 64  # per step of a program, which works on one image
SIDE = 7


@triton.jit
def _reads(tall_ptr, wide_ptr, channel, row, column, height, width):
    """The sum of the weights with which tall, wide and the map itself read each token."""
    sums = tl.zeros_like(row + column).to(tl.float32) + 1
    for tap in range(21):
        y, x = row - tap // 3 + 3, column - tap % 3 + 1
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        sums += tl.where(inside, tl.load(tall_ptr + channel * 21 + tap).to(tl.float32), 0.0)
        y, x = row - tap // 7 + 1, column - tap % 7 + 3
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        sums += tl.where(inside, tl.load(wide_ptr + channel * 21 + tap).to(tl.float32), 0.0)
    return sums


@triton.jit
def _average(
    u_ptr, tall_ptr, wide_ptr, average_ptr, channels, images, height, width,
    image_block: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr,
):  # fmt: skip
    """Averages (N, C) of tall + wide + u, for some images and one channel."""
    channel = tl.program_id(0)
    number = tl.arange(0, image_block)
    sums = tl.zeros((image_block,), tl.float32)
    for first_row in range(0, height, row_block):
        for first_column in range(0, width, column_block):
            row = first_row + tl.arange(0, row_block)[:, None]
            column = first_column + tl.arange(0, column_block)[None, :]
            mask = (row < height) & (column < width)
            reads = _reads(tall_ptr, wide_ptr, channel, row, column, height, width)
            for i in range(image_block):
                image = tl.program_id(1) * image_block + i
                start = (channel.to(tl.int64) * images + image) * height * width
                u = tl.load(u_ptr + start + row * width + column, mask=mask & (image < images), other=0.0)
                sums += tl.where(number == i, tl.sum(u.to(tl.float32) * reads), 0.0)
    image = tl.program_id(1) * image_block + number
    tl.store(average_ptr + image * channels + channel, sums / (height * width), mask=image < images)


@triton.jit
def _load_taps(tall_ptr, wide_ptr, channel, tap, mask):
    """Tall, wide and identity kernels of some channels, padded to 7x7."""
    dy, dx = tap // 7, tap % 7
    is_tall, is_wide = (dx >= 2) & (dx <= 4), (dy >= 2) & (dy <= 4)
    tall = tl.load(tall_ptr + channel * 21 + dy * 3 + dx - 2, mask=mask & is_tall, other=0.0).to(tl.float32)
    wide = tl.load(wide_ptr + channel * 21 + (dy - 2) * 7 + dx, mask=mask & is_wide, other=0.0).to(tl.float32)
    return tall, wide, tl.where(mask & (tap == 24), 1.0, 0.0)


@triton.jit
def _reweight(
    average_ptr, tall_ptr, wide_ptr, narrow_ptr, narrow_bias_ptr, broad_ptr, broad_bias_ptr,
    hidden_ptr, share_ptr, kernel_ptr, channels, hiddens, images,
    hidden_block: tl.constexpr, block: tl.constexpr, tap_block: tl.constexpr,
):  # fmt: skip
    """For one image: hidden values (N, hiddens), weights a, b, c (3, N, C), and kernels (C, N, 7, 7)."""
    image = tl.program_id(0)
    unit = tl.arange(0, hidden_block)
    hidden = tl.load(narrow_bias_ptr + unit, mask=unit < hiddens, other=0.0).to(tl.float32)
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        average = tl.load(average_ptr + image * channels + channel, mask=channel < channels, other=0.0)
        mask = (unit < hiddens)[:, None] & (channel < channels)[None, :]
        weight = tl.load(narrow_ptr + unit[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        hidden += tl.sum(weight.to(tl.float32) * average[None, :], 1)
    tl.store(hidden_ptr + image * hiddens + unit, hidden, mask=unit < hiddens)
    hidden = gelu(hidden)
    tap = tl.arange(0, tap_block)[None, :]
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        ours = channel < channels
        mask = ours[:, None] & (unit < hiddens)[None, :]
        row = broad_ptr + channel[:, None] * 3 * hiddens + unit[None, :]
        a = tl.sum(tl.load(row, mask=mask, other=0.0).to(tl.float32) * hidden[None, :], 1)
        b = tl.sum(tl.load(row + hiddens, mask=mask, other=0.0).to(tl.float32) * hidden[None, :], 1)
        c = tl.sum(tl.load(row + 2 * hiddens, mask=mask, other=0.0).to(tl.float32) * hidden[None, :], 1)
        a += tl.load(broad_bias_ptr + channel * 3, mask=ours, other=0.0).to(tl.float32)
        b += tl.load(broad_bias_ptr + channel * 3 + 1, mask=ours, other=0.0).to(tl.float32)
        c += tl.load(broad_bias_ptr + channel * 3 + 2, mask=ours, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.maximum(a, b), c)
        a, b, c = tl.exp(a - largest), tl.exp(b - largest), tl.exp(c - largest)
        sums = a + b + c
        a, b, c = a / sums, b / sums, c / sums
        there = share_ptr + image * channels + channel
        tl.store(there, a, mask=ours)
        tl.store(there + images * channels, b, mask=ours)
        tl.store(there + 2 * images * channels, c, mask=ours)
        mask = ours[:, None] & (tap < 49)
        tall, wide, itself = _load_taps(tall_ptr, wide_ptr, channel[:, None], tap, mask)
        kernel = a[:, None] * tall + b[:, None] * wide + c[:, None] * itself
        tl.store(kernel_ptr + (channel[:, None] * images + image) * 49 + tap, kernel, mask=mask)


@triton.jit
def _reweight_backward(
    grad_ptr, share_ptr, tall_ptr, wide_ptr, narrow_ptr, broad_ptr, hidden_ptr,
    grad_logit_ptr, grad_hidden_ptr, grad_average_ptr, channels, hiddens, images,
    hidden_block: tl.constexpr, block: tl.constexpr, tap_block: tl.constexpr,
):  # fmt: skip
    """For one image: gradients of logits (N, 3 C), hidden values and averages, from that of its kernels."""
    image = tl.program_id(0)
    unit = tl.arange(0, hidden_block)
    tap = tl.arange(0, tap_block)[None, :]
    total = tl.zeros((hidden_block,), tl.float32)
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        ours = channel < channels
        mask = ours[:, None] & (tap < 49)
        tall, wide, itself = _load_taps(tall_ptr, wide_ptr, channel[:, None], tap, mask)
        grad = tl.load(grad_ptr + (channel[:, None] * images + image) * 49 + tap, mask=mask, other=0.0)
        there = share_ptr + image * channels + channel
        a = tl.load(there, mask=ours, other=0.0)
        b = tl.load(there + images * channels, mask=ours, other=0.0)
        c = tl.load(there + 2 * images * channels, mask=ours, other=0.0)
        grad_a, grad_b, grad_c = tl.sum(grad * tall, 1), tl.sum(grad * wide, 1), tl.sum(grad * itself, 1)
        common = a * grad_a + b * grad_b + c * grad_c
        grad_a, grad_b, grad_c = a * (grad_a - common), b * (grad_b - common), c * (grad_c - common)
        there = grad_logit_ptr + (image * channels + channel) * 3
        tl.store(there, grad_a, mask=ours)
        tl.store(there + 1, grad_b, mask=ours)
        tl.store(there + 2, grad_c, mask=ours)
        mask = ours[:, None] & (unit < hiddens)[None, :]
        row = broad_ptr + channel[:, None] * 3 * hiddens + unit[None, :]
        part = tl.load(row, mask=mask, other=0.0).to(tl.float32) * grad_a[:, None]
        part += tl.load(row + hiddens, mask=mask, other=0.0).to(tl.float32) * grad_b[:, None]
        part += tl.load(row + 2 * hiddens, mask=mask, other=0.0).to(tl.float32) * grad_c[:, None]
        total += tl.sum(part, 0)
    total *= gelu_slope(tl.load(hidden_ptr + image * hiddens + unit, mask=unit < hiddens, other=0.0))
    tl.store(grad_hidden_ptr + image * hiddens + unit, total, mask=unit < hiddens)
    for first in range(0, channels, block):
        channel = first + tl.arange(0, block)
        mask = (unit < hiddens)[:, None] & (channel < channels)[None, :]
        weight = tl.load(narrow_ptr + unit[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        grad = tl.sum(weight.to(tl.float32) * total[:, None], 0)
        tl.store(grad_average_ptr + image * channels + channel, grad, mask=channel < channels)


@triton.jit
def _sum_images(left_ptr, right_ptr, weight_ptr, bias_ptr, tile, rows, columns, images, is_gelu: tl.constexpr,
                block: tl.constexpr):  # fmt: skip
    """A tile of the gradients of a linear layer's weight and bias, from its inputs and output gradients."""
    tiles = tl.cdiv(columns, block)
    row = tile // tiles * block + tl.arange(0, block)
    column = tile % tiles * block + tl.arange(0, block)
    total = tl.zeros((block, block), tl.float32)
    bias = tl.zeros((block,), tl.float32)
    for image in range(images):
        left = tl.load(left_ptr + image * rows + row, mask=row < rows, other=0.0)
        right = tl.load(right_ptr + image * columns + column, mask=column < columns, other=0.0)
        if is_gelu:
            right = gelu(right)
        total += left[:, None] * right[None, :]
        bias += left
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(weight_ptr + row[:, None] * columns + column[None, :], total, mask=mask)
    if tile % tiles == 0:
        tl.store(bias_ptr + row, bias, mask=row < rows)


@triton.jit
def _weights_backward(
    grad_hidden_ptr, average_ptr, grad_logit_ptr, hidden_ptr, narrow_ptr, narrow_bias_ptr, broad_ptr, broad_bias_ptr,
    channels, hiddens, images, block: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(hiddens, block) * tl.cdiv(channels, block)
    tile = tl.program_id(0)
    if tile < tiles:
        _sum_images(grad_hidden_ptr, average_ptr, narrow_ptr, narrow_bias_ptr, tile, hiddens, channels, images,
                    False, block)  # fmt: skip
    else:
        _sum_images(grad_logit_ptr, hidden_ptr, broad_ptr, broad_bias_ptr, tile - tiles, 3 * channels, hiddens, images,
                    True, block)  # fmt: skip


@triton.jit
def _map_backward(
    grad_u_ptr, u_ptr, grad_average_ptr, grad_kernel_ptr, share_ptr, tall_ptr, wide_ptr, y_ptr, parts_ptr,
    channels, images, height, width, image_share,
    row_block: tl.constexpr, column_block: tl.constexpr, tap_block: tl.constexpr,
):  # fmt: skip
    """The gradient of some images of a channel, and partial sums for tall and wide: (parts, 2, C, 21)."""
    channel, part = tl.program_id(0), tl.program_id(1)
    first, last = part * image_share, tl.minimum((part + 1) * image_share, images)
    tap = tl.arange(0, tap_block)
    grad_tall, grad_wide = tl.zeros((tap_block,), tl.float32), tl.zeros((tap_block,), tl.float32)
    for image in range(first, last):  # through the kernels
        kernel = grad_kernel_ptr + (channel * images + image) * 49
        share = share_ptr + image * channels + channel
        of_tall = tl.load(kernel + tap // 3 * 7 + tap % 3 + 2, mask=tap < 21, other=0.0)
        of_wide = tl.load(kernel + (tap // 7 + 2) * 7 + tap % 7, mask=tap < 21, other=0.0)
        grad_tall += of_tall * tl.load(share)
        grad_wide += of_wide * tl.load(share + images * channels)
    for first_row in range(0, height, row_block):  # through the average
        for first_column in range(0, width, column_block):
            row = first_row + tl.arange(0, row_block)[:, None]
            column = first_column + tl.arange(0, column_block)[None, :]
            mask = (row < height) & (column < width)
            reads = _reads(tall_ptr, wide_ptr, channel, row, column, height, width)
            sums = tl.zeros((row_block, column_block), tl.float32)
            for image in range(first, last):
                grad = tl.load(grad_average_ptr + image * channels + channel) / (height * width)
                place = (channel.to(tl.int64) * images + image) * height * width + row * width + column
                u = tl.load(u_ptr + place, mask=mask, other=0.0).to(tl.float32)
                sums += grad * u
                grad = grad * reads + tl.load(grad_u_ptr + place, mask=mask, other=0.0).to(tl.float32)
                tl.store(y_ptr + place, grad.to(y_ptr.dtype.element_ty), mask=mask)
            for i in range(21):
                y, x = row - i // 3 + 3, column - i % 3 + 1
                inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                grad_tall += tl.where(tap == i, tl.sum(tl.where(inside, sums, 0.0)), 0.0)
                y, x = row - i // 7 + 1, column - i % 7 + 3
                inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                grad_wide += tl.where(tap == i, tl.sum(tl.where(inside, sums, 0.0)), 0.0)
    there = parts_ptr + (part * 2 * channels + channel) * 21 + tap
    tl.store(there, grad_tall, mask=tap < 21)
    tl.store(there + channels * 21, grad_wide, mask=tap < 21)


@triton_op('mmstrip_gpu::local_kernels', mutates_args={})
def _local_kernels(
    u: Tensor, tall: Tensor, wide: Tensor, narrow: Tensor, narrow_bias: Tensor, broad: Tensor, broad_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For u (C, N, H, W): averages (N, C), hidden values, weights a, b, c (3, N, C), kernels (C, N, 7, 7)."""
    channels, images, height, width = u.shape
    hiddens = narrow.shape[0]
    if not on_card(u):
        return _local_kernels_by_aten(u, tall, wide, narrow, narrow_bias, broad, broad_bias)
    average, hidden, share, kernel = (
        u.new_empty(shape, dtype=torch.float32)
        for shape in ((images, channels), (images, hiddens), (3, images, channels), (channels, images, SIDE, SIDE))
    )
    launch(_average)[channels, triton.cdiv(images, IMAGES)](
        u, tall, wide, average, channels, images, height, width,
        image_block=IMAGES, row_block=block_size(height, 8, 32), column_block=block_size(width, 8, 32),
    )  # fmt: skip
    launch(_reweight)[images,](
        average, tall, wide, narrow, narrow_bias, broad, broad_bias, hidden, share, kernel, channels, hiddens, images,
        hidden_block=block_size(hiddens, 16, 4096), block=CHANNELS, tap_block=TAPS,
    )  # fmt: skip
    return average, hidden, share, kernel


@triton_op('mmstrip_gpu::local_kernels_backward', mutates_args={})
def _local_kernels_backward(
    grad_u: Tensor, grad_kernel: Tensor, u: Tensor, tall: Tensor, wide: Tensor, narrow: Tensor, broad: Tensor,
    average: Tensor, hidden: Tensor, share: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, of which one through the convolution is given, of tall and wide in parts (P, 2, C, 21), and of
    narrow, its bias, broad, its bias."""
    channels, images, height, width = u.shape
    hiddens = narrow.shape[0]
    if not on_card(u):
        saved = average, hidden, share
        return _local_kernels_backward_by_aten(grad_u, grad_kernel, u, tall, wide, narrow, broad, *saved)
    parts = min(triton.cdiv(PROGRAMS, channels), images)
    shapes = (images, 3 * channels), (images, hiddens), (images, channels), (parts, 2, channels, 21)
    grad_logit, grad_hidden, grad_average, of_kernels = (u.new_empty(shape, dtype=torch.float32) for shape in shapes)
    shapes = (hiddens, channels), (hiddens,), (3 * channels, hiddens), (3 * channels,)
    of_narrow, of_narrow_bias, of_broad, of_broad_bias = (u.new_empty(shape, dtype=torch.float32) for shape in shapes)
    launch(_reweight_backward)[images,](
        grad_kernel, share, tall, wide, narrow, broad, hidden, grad_logit, grad_hidden, grad_average,
        channels, hiddens, images, hidden_block=block_size(hiddens, 16, 4096), block=CHANNELS, tap_block=TAPS,
    )  # fmt: skip
    tiles = triton.cdiv(hiddens, CHANNELS) * (triton.cdiv(channels, CHANNELS) + triton.cdiv(3 * channels, CHANNELS))
    launch(_weights_backward)[tiles,](
        grad_hidden, average, grad_logit, hidden, of_narrow, of_narrow_bias, of_broad, of_broad_bias,
        channels, hiddens, images, block=CHANNELS,
    )  # fmt: skip
    y = torch.empty_like(u)
    launch(_map_backward)[channels, parts](
        grad_u, u, grad_average, grad_kernel, share, tall, wide, y, of_kernels,
        channels, images, height, width, triton.cdiv(images, parts),
        row_block=block_size(height, 8, 32), column_block=block_size(width, 8, 32), tap_block=32,
    )  # fmt: skip
    return y, of_kernels, of_narrow, of_narrow_bias, of_broad, of_broad_bias


def _padded(tall: Tensor, wide: Tensor) -> Tensor:
    """Tall, wide and identity kernels (3, C, 7, 7)."""
    itself = F.pad(torch.ones_like(tall[:, 0, :1, :1]), (3, 3, 3, 3))
    return torch.stack([F.pad(tall[:, 0], (2, 2)), F.pad(wide[:, 0], (0, 0, 2, 2)), itself])


def _is_read(side: int, like: Tensor) -> Tensor:
    """(side, 7): whether the output that reads a token with a given weight lies in the map."""
    output = torch.arange(side, device=like.device)[:, None] - torch.arange(SIDE, device=like.device) + SIDE // 2
    return ((output >= 0) & (output < side)).to(like.dtype)


@torch.autocast('cpu', enabled=False)  # would cast within the operator
def _local_kernels_by_aten(u, tall, wide_, narrow, narrow_bias, broad, broad_bias):
    dtype = wide(u.dtype)
    kernels = _padded(tall, wide_).to(dtype)
    rows, columns = (_is_read(side, kernels) for side in u.shape[2:])
    reads = torch.einsum('cyx,hy,wx->chw', kernels.sum(0), rows, columns)
    average = torch.einsum('cnhw,chw->nc', u.to(dtype), reads) / (u.shape[2] * u.shape[3])
    hidden = average @ narrow.to(dtype).t() + narrow_bias
    logits = F.gelu(hidden) @ broad.to(dtype).t() + broad_bias
    share = logits.unflatten(1, (-1, 3)).softmax(2).permute(2, 0, 1).contiguous()
    return average, hidden, share, torch.einsum('knc,kcyx->cnyx', share, kernels).contiguous()


@torch.autocast('cpu', enabled=False)  # would cast within the operator
def _local_kernels_backward_by_aten(grad_u, grad_kernel, u, tall, wide_, narrow, broad, average, hidden, share):
    dtype = wide(u.dtype)
    kernels, grad_kernel = _padded(tall, wide_).to(dtype), grad_kernel.to(dtype)
    grad_share = torch.einsum('cnyx,kcyx->knc', grad_kernel, kernels)
    grad_logit = share * (grad_share - (share * grad_share).sum(0))
    grad_logit = grad_logit.permute(1, 2, 0).flatten(1)
    grad_hidden = torch.ops.aten.gelu_backward(grad_logit @ broad.to(dtype), hidden)
    grad_average = grad_hidden @ narrow.to(dtype) / (u.shape[2] * u.shape[3])
    rows, columns = (_is_read(side, kernels) for side in u.shape[2:])
    reads = torch.einsum('cyx,hy,wx->chw', kernels.sum(0), rows, columns)
    y = (grad_u + torch.einsum('nc,chw->cnhw', grad_average, reads)).to(u.dtype)
    through = torch.einsum('nc,cnhw,hy,wx->cyx', grad_average, u.to(dtype), rows, columns)
    grad_tall = (torch.einsum('nc,cnyx->cyx', share[0], grad_kernel) + through)[:, :, 2:5]
    grad_wide = (torch.einsum('nc,cnyx->cyx', share[1], grad_kernel) + through)[:, 2:5]
    parts = torch.stack([grad_tall.flatten(1), grad_wide.flatten(1)])[None]
    of_broad = grad_logit.t() @ F.gelu(hidden)
    return y, parts, grad_hidden.t() @ average, grad_hidden.sum(0), of_broad, grad_logit.sum(0)


class _LocalStrips(Function):
    @staticmethod
    def forward(ctx, u, tall, wide, narrow, narrow_bias, broad, broad_bias, beside):
        saved = _local_kernels(u, tall, wide, narrow.flatten(1), narrow_bias, broad.flatten(1), broad_bias)
        ctx.save_for_backward(u, tall, wide, narrow, broad, *saved)
        ctx.beside = beside is not None
        return _depthwise(u, saved[-1], beside)

    @staticmethod
    def backward(ctx, grad):
        u, tall, wide, narrow, broad, average, hidden, share, kernel = ctx.saved_tensors
        grad, beside = grad.contiguous(), None
        if ctx.beside:
            beside, grad = grad.chunk(2)
        grad_u, parts = _depthwise_backward(grad, u, kernel)
        grad_u, parts, *others = _local_kernels_backward(
            grad_u, total(parts), u, tall, wide, narrow.flatten(1), broad.flatten(1), average, hidden, share
        )
        of_tall, of_wide = (part.to(tall.dtype).view_as(like) for part, like in zip(total(parts), (tall, wide)))
        layers = narrow, narrow[:, 0, 0, 0], broad, broad[:, 0, 0, 0]
        of_layers = (other.to(like.dtype).view(like.shape) for other, like in zip(others, layers))
        return grad_u, of_tall, of_wide, *of_layers, beside


def is_local_strips(module: LocalStripMixing) -> bool:
    """Whether the formula computes what a module does."""
    return is_stock(module, LocalStripMixing, FastLocalStripMixing.layers)


def mix_locally(module: LocalStripMixing, u: Tensor, beside: Tensor | None = None) -> Tensor:
    """The formula on (C, N, H, W). A map ``beside`` of the same shape is put before the result: (2 C, N, H, W)."""
    narrow, _, broad = module.reweight
    layers = narrow.weight, narrow.bias, broad.weight, broad.bias
    return _LocalStrips.apply(u, module.tall.weight, module.wide.weight, *layers, beside)
