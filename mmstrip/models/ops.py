"""Fast forms of what Strip-MLP computes most, each equal to the plain formula beside it.

Shapes: N images, C channels, an H x W map. Maps are read and written in channels_last memory, where a map is a matrix
of pixels x channels. In eager mode hand-written gradients save passes over memory and what is kept for the backward
pass; a compiler fuses the plain formulas itself, so it gets those.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import native

# On CPUs (oneDNN) the weight gradient of wider depthwise kernels leaves vector code, and takes 10 to 20 times as long.
FAST_KERNEL_WIDTH = 3


def _plain() -> bool:
    """Whether a graph is being recorded, in which hand-written gradients are only in the way."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def version(tensor: Tensor) -> int | None:
    """Counts in-place changes of a tensor, such as optimizer steps; None where that is not to be known."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def pointwise(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """1x1 convolution of concatenated maps, without the concatenation: one matrix product a part, accumulated.

    Args:
        parts: Maps (N, C_i, H, W).
        weight: (O, sum of C_i, 1, 1).
        bias: (O, ), optional.
        residual: Map (N, O, H, W) that is added, optional.

    Returns:
        (N, O, H, W).
    """
    tensors = [tensor for tensor in (*parts, weight, bias, residual) if tensor is not None]
    if _wants_gradient(*tensors):
        out = native.Pointwise.apply(weight, bias, *parts) if native.fits(*tensors) else _pointwise(parts, weight, bias)
        return _add_residual(out, residual)
    if native.fits(*tensors):
        return native.operators.pointwise(parts, weight, bias, residual)
    return _add_residual(_pointwise(parts, weight, bias), residual)


def _pointwise(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, height, width = parts[0].shape
    out = None
    for part, columns in zip(parts, weight.flatten(1).split([part.shape[1] for part in parts], dim=1)):
        pixels = part.permute(0, 2, 3, 1).flatten(0, 2)
        if out is None:
            out = F.linear(pixels, columns, bias)
        elif _plain():
            out = out + F.linear(pixels, columns)
        else:
            out.addmm_(pixels.to(out.dtype), columns.to(out.dtype).t())
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum of maps (N, C, H, W), each times its weights (N, C, 1, 1)."""
    out = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:]):
        out = torch.addcmul(out, part, weight) if _plain() else out.addcmul_(part, weight)
    return out


def _add_residual(branch: Tensor, residual: Tensor | None) -> Tensor:
    """Their sum, in the memory of the branch where no gradient is wanted: the branch is lost then."""
    if residual is None:
        return branch
    fresh = residual.dtype == branch.dtype and not _plain() and not _wants_gradient(residual, branch)
    return branch.add_(residual) if fresh else residual + branch


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of (N, C, H, W) with (C, 1, K_h, K_w), odd sides, the map's size kept."""
    if native.has_width(weight) and native.fits(x, weight):
        function = native.Depthwise.apply if _wants_gradient(x, weight) else native.operators.depthwise
        return function(x, weight)
    kernel, width = weight.shape[3], x.shape[3]
    slow = x.device.type == 'cpu' and x.dtype == torch.float32 and kernel in (5, 7) and width > FAST_KERNEL_WIDTH
    if slow and _wants_gradient(weight) and not torch.is_autocast_enabled('cpu') and not torch.jit.is_tracing():
        return _WideDepthwise.apply(x, weight)
    return F.conv2d(x, weight, padding=_same(weight), groups=x.shape[1])


def norm_activate_depthwise(norm: nn.Module, act: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """:func:`depthwise` of ``act(norm(x))``."""
    layer = _native_norm(norm, act, x, weight) if native.has_width(weight) else None
    if layer is None:
        (x,) = norm_activate(norm, act, x)
        return depthwise(x, weight)
    if _wants_gradient(x, weight, *layer[:2]):
        return native.NormGELUDepthwise.apply(x, weight, *layer[:2], layer[2:])
    return native.operators.norm_gelu_depthwise(x, weight, *layer)[0]


def _native_norm(norm: nn.Module, act: nn.Module, *inputs: Tensor) -> tuple | None:
    """A norm in front of GELU as the operators take it, if they can: its weight, its bias, :func:`_statistics`."""
    if not is_gelu(act) or not native.fits(*inputs):
        return None
    if isinstance(norm, nn.Identity):
        ones, zeros = inputs[-1].new_ones(len(inputs[-1])), inputs[-1].new_zeros(len(inputs[-1]))
        return ones, zeros, zeros, ones, False, 0.0, 0.0
    if not is_batch_norm(norm) or not native.fits(norm.weight, norm.bias, norm.running_mean):
        return None
    return norm.weight, norm.bias, *_statistics(norm)


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor, bool, float, float]:
    """BN's statistics and how to use them; counts the batch in training."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether it is BN with all that a hand-written gradient reckons with."""
    plain = type(norm) is nn.BatchNorm2d and norm.affine
    return plain and norm.track_running_stats and norm.momentum is not None


def local_strips(u: Tensor, tall: Tensor, wide: Tensor, reweight: nn.Sequential) -> Tensor:
    """LSMM (Section 3.4) of (N, C, H, W): depthwise convolutions and u itself, in a weighted sum.

    Args:
        u: (N, C, H, W).
        tall: (C, 1, 7, 3).
        wide: (C, 1, 3, 7).
        reweight: 1x1 convolution, activation and 1x1 convolution, from the average of the three over H and W
            (N, C, 1, 1) to their weights (N, 3 C, 1, 1), before their softmax.

    Returns:
        (N, C, H, W).
    """
    narrow, act, broad = reweight
    arguments = u, tall, wide, narrow.weight, narrow.bias, broad.weight, broad.bias
    if is_gelu(act) and native.fits(*arguments):
        if _wants_gradient(*arguments):
            return native.LocalStrips.apply(*arguments)
        return native.operators.local_strips(*arguments)[0]
    paths = depthwise(u, tall), depthwise(u, wide), u
    # One sum a path is cheaper than adding the paths first, and its gradient takes no memory.
    total = sum(sum_tokens(path.permute(0, 2, 3, 1)) for path in paths).permute(0, 3, 1, 2)
    average = (total / (u.shape[2] * u.shape[3])).to(u.dtype)
    hidden = act(pointwise((average,), narrow.weight, narrow.bias))
    weights = pointwise((hidden,), broad.weight, broad.bias).unflatten(1, (-1, 3)).softmax(dim=2)
    return weighted_sum(paths, weights.to(u.dtype).unbind(dim=2))


def _same(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2


class _WideDepthwise(Function):
    """Depthwise convolution whose weight gradient is taken a few columns of the kernel at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=_same(weight), groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        padding = _same(weight)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolution_backward(grad, x, weight, padding, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            parts = []
            side = (weight.shape[3] - FAST_KERNEL_WIDTH) // 2
            for left, columns in zip((padding[1], 1, -2), weight.split((side, FAST_KERNEL_WIDTH, side), dim=3)):
                # Columns beside the middle see the map moved; the middle ones see it padded as it is.
                middle = columns.shape[3] == FAST_KERNEL_WIDTH
                moved = x if middle else F.pad(x, (left, side - 1 - left))
                inner = (padding[0], int(middle))
                parts.append(_convolution_backward(grad, moved, columns, inner, (False, True, False))[1])
            grad_weight = torch.cat(parts, dim=3)
        return grad_x, grad_weight


def _convolution_backward(grad, x, weight, padding, wanted):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), padding, (1, 1), False, (0, 0), x.shape[1], wanted
    )


def strip_layer(x: Tensor, weight: Tensor, bias: Tensor, axis: str, position: Tensor | None = None) -> Tensor:
    """The strip MLP layer's sum (Section 3.2) over x plus its positions; see :class:`.strip_mixing.StripMLPLayer`.

    Args:
        x: (N, C, H, W), the side that ``axis`` mixes along being the layer's tokens.
        weight: (G, strip_width, tokens, tokens).
        bias: (G, tokens), or a map (C, H, W).
        axis: 'row' or 'column'.
        position: Added to x first, (C, H, W), optional.

    Returns:
        (N, C, H, W).
    """
    tensors = (x, weight, bias) if position is None else (x, weight, bias, position)
    if native.fits(*tensors):
        function = native.StripLayer.apply if _wants_gradient(*tensors) else native.operators.strip_layer
        return function(x, weight, bias, axis == 'row', position)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    if position is not None:
        x = x + position.to(x.dtype)
    if _plain():
        return _plain_strip_layer(x, weight, bias, axis)
    if _wants_gradient(x, weight, bias):
        return _StripLayer.apply(x, weight, bias, axis)
    return _strip_layer(x, weight, bias, axis)[0]


def _plain_strip_layer(x: Tensor, weight: Tensor, bias: Tensor, axis: str) -> Tensor:
    patches, strip_width = weight.shape[:2]
    lines = _lines_first(x, axis, patches)
    shape = lines.shape
    padded = F.pad(lines.flatten(2, 3), (0, 0, 0, 0, strip_width // 2, strip_width // 2))
    y = _bias_lines(bias, axis, patches).expand(shape).flatten(1, 3)
    for k in range(strip_width):
        y = torch.baddbmm(y, padded[:, k : k + shape[1]].flatten(1, 2), weight[:, k].transpose(1, 2))
    return _lines_back(y.view(shape), axis)


def _lines_first(x: Tensor, axis: str, patches: int) -> Tensor:
    """(N, C, H, W) seen as (patches, lines, N, C / patches, tokens)."""
    x = x.transpose(2, 3) if axis == 'row' else x
    return x.unflatten(1, (-1, patches)).permute(2, 4, 0, 1, 3)


def _lines_back(y: Tensor, axis: str) -> Tensor:
    """The inverse of _lines_first, in channels_last memory."""
    order = (2, 1, 4, 3, 0) if axis == 'row' else (2, 4, 1, 3, 0)
    return y.permute(order).flatten(3).permute(0, 3, 1, 2)


def _bias_lines(bias: Tensor, axis: str, patches: int) -> Tensor:
    """A bias (G, tokens) or a map (C, H, W), to be broadcast to (patches, lines, N, C / patches, tokens)."""
    return bias[:, None, None, None] if bias.dim() == 2 else _lines_first(bias[None], axis, patches)


def _padded_rows(x: Tensor, axis: str, patches: int, pad: int) -> tuple[Tensor, torch.Size, int]:
    """Lines of (N, C, H, W) as rows (patches, lines * M, tokens), ``pad`` lines of zeros before and after them.

    Also the shape of the lines, (patches, lines, N, C / patches, tokens), and their M rows.
    """
    lines = _lines_first(x, axis, patches)
    shape = lines.shape
    padded = x.new_empty(patches, shape[1] + 2 * pad, *shape[2:])
    if pad:
        padded[:, :pad] = 0
        padded[:, -pad:] = 0
    padded.narrow(1, pad, shape[1]).copy_(lines)
    return padded.view(patches, -1, shape[4]), shape, shape[2] * shape[3]


def _strip_layer(x: Tensor, weight: Tensor, bias: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """The layer's output and its input as padded rows. Products add up in place, which is quick on dense memory."""
    patches, strip_width, tokens, _ = weight.shape
    rows, shape, step = _padded_rows(x, axis, patches, strip_width // 2)
    count = shape[1] * step
    y = x.new_empty(shape)
    y.copy_(_bias_lines(bias, axis, patches))
    out = y.view(patches, count, tokens)
    for k in range(strip_width):
        out.baddbmm_(rows.narrow(1, k * step, count), weight[:, k].transpose(1, 2))
    return _lines_back(y, axis), rows


class _StripLayer(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, axis: str) -> Tensor:
        y, rows = _strip_layer(x, weight, bias, axis)
        ctx.save_for_backward(rows, weight)
        ctx.axis, ctx.bias_dim = axis, bias.dim()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        patches, strip_width = weight.shape[:2]
        pad = strip_width // 2
        padded_grad, shape, step = _padded_rows(grad, ctx.axis, patches, pad)
        count = shape[1] * step
        grad_rows = padded_grad.narrow(1, pad * step, count)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(padded_grad.narrow(1, 2 * pad * step, count), weight[:, 0])
            for k in range(1, strip_width):
                grad_x.baddbmm_(padded_grad.narrow(1, (2 * pad - k) * step, count), weight[:, k])
            grad_x = _lines_back(grad_x.view(shape), ctx.axis)
        if ctx.needs_input_grad[1]:
            products = [grad_rows.transpose(1, 2) @ rows.narrow(1, k * step, count) for k in range(strip_width)]
            grad_weight = torch.stack(products, dim=1)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(1) if ctx.bias_dim == 2 else grad.sum(0)
        return grad_x, grad_weight, grad_bias, None


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the exact GELU, which is what the functions here compute."""
    return isinstance(act, nn.GELU) and act.approximate == 'none'


def norm_activate(norm: nn.Module, act: nn.Module, x: Tensor, parts: int = 1) -> list[Tensor]:
    """``act(norm(x))`` of (N, C, H, W), cut into equal parts of the channels, each dense in memory.

    BN and GELU keep x alone for the backward pass, in which they normalise once more.
    """
    if not (is_batch_norm(norm) and is_gelu(act)) or _plain() or not _wants_gradient(x, *norm.parameters()):
        x = norm(x)
        fresh = is_gelu(act) and parts == 1 and not _plain() and not _wants_gradient(x)
        return [torch.ops.aten.gelu_(x)] if fresh else [act(part) for part in x.chunk(parts, dim=1)]
    return list(_NormGELU.apply(x, norm.weight, norm.bias, _statistics(norm), parts))


def pointwise_norm_activate(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, norm: nn.Module, act: nn.Module, chunks: int = 1
) -> list[Tensor]:
    """:func:`pointwise`, then :func:`norm_activate`."""
    inputs = (*parts, weight) if bias is None else (*parts, bias, weight)
    layer = _native_norm(norm, act, *inputs)
    if layer is None:
        return norm_activate(norm, act, pointwise(parts, weight, bias), chunks)
    if _wants_gradient(*inputs, *layer[:2]):
        return list(native.PointwiseNormGELU.apply(weight, bias, *layer[:2], layer[2:], chunks, *parts))
    return native.operators.pointwise_norm_gelu(parts, weight, bias, *layer, chunks)


class _NormGELU(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, statistics: tuple, parts: int) -> tuple[Tensor, ...]:
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, *statistics)
        running_mean, running_var, ctx.training, _, ctx.eps = statistics
        if not ctx.training:
            mean, inverse = running_mean.clone(), (running_var + ctx.eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return tuple(F.gelu(part) for part in y.chunk(parts, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        variance = inverse.square().reciprocal() - ctx.eps
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=ctx.eps)
        chunks = zip(grads, y.chunk(len(grads), dim=1))
        grad = [torch.ops.aten.gelu_backward(grad, part) for grad, part in chunks]
        grad = grad[0] if len(grad) == 1 else torch.cat(grad, dim=1)
        backward = torch.ops.aten.native_batch_norm_backward
        wanted = list(ctx.needs_input_grad[:3])
        return *backward(grad, x, weight, mean, variance, mean, inverse, ctx.training, ctx.eps, wanted), None, None


def channel_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    expand: nn.Linear,
    act: nn.Module,
    grn: nn.Module,
    reduce: nn.Linear,
    residual: Tensor | None = None,
) -> Tensor:
    """LayerNorm, linear layer, activation, GRN and linear layer of (N, C, H, W), over the channels; plus a residual."""
    layers = norm.weight, norm.bias, norm.eps, expand.weight, expand.bias, grn.gamma, grn.beta, grn.eps
    layers = *layers, reduce.weight, reduce.bias
    tensors = [tensor for tensor in (x, residual, *layers) if isinstance(tensor, Tensor)]
    if is_gelu(act) and native.fits(*tensors):
        if _wants_gradient(*tensors):
            return _add_residual(native.ChannelMLP.apply(x, *layers), residual)
        return native.operators.channel_mlp(x, *layers, residual)
    x = expand(norm(x.permute(0, 2, 3, 1)))
    last = reduce.weight, grn.shifted_bias(reduce)
    if is_gelu(act):
        x = gelu_response_norm_linear(x, grn.gamma, grn.eps, *last)
    else:
        x = F.linear(response_norm(act(x), grn.gamma, grn.eps), *last)
    return _add_residual(x.permute(0, 3, 1, 2), residual)


def gelu_response_norm_linear(x: Tensor, gamma: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, GRN without its shift, and a linear layer (O, C), of (N, H, W, C): only x is kept for the backward pass.

    Where no gradient is wanted the memory of x is used: x is lost then.
    """
    if _plain():
        return F.linear(response_norm(F.gelu(x), gamma, eps), weight, bias)
    if _wants_gradient(x, gamma, weight, bias):
        return _GELUResponseNormLinear.apply(x, gamma, eps, weight.to(x.dtype), bias.to(x.dtype))
    y = torch.ops.aten.gelu_(x)
    return F.linear(y.mul_(_multiplier(_token_norm(y), gamma, eps).to(y.dtype)), weight, bias)


def response_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """GRN of (N, H, W, C) without its shift; see :class:`.channel_mixing.GlobalResponseNorm`."""
    return x * _multiplier(_token_norm(x), gamma, eps).to(x.dtype)


def _multiplier(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return 1 + gamma * (norm / (norm.mean(dim=-1, keepdim=True) + eps))


def _token_norm(x: Tensor) -> Tensor:
    """L2 norm over H and W of (N, H, W, C): (N, 1, 1, C), in at least float32."""
    # Squares overflow half precision.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return sum_tokens(wide.square()).clamp_min(1e-24).sqrt()  # it has no gradient at 0


def sum_tokens(x: Tensor) -> Tensor:
    """Sum over H and W of (N, H, W, C): (N, 1, 1, C), in at least float32."""
    if x.device.type != 'cpu' or x.dtype != torch.float32 or torch.is_autocast_enabled('cpu') or _plain():
        return x.sum(dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    # CPUs add along strides slowly, and multiply matrices fast.
    tokens = x.flatten(1, 2)
    return (x.new_ones(1, 1, tokens.shape[1]).expand(len(tokens), -1, -1) @ tokens)[:, None]


def _response_norm_backward(product: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What GRN's multiplier hands on, given the sums of gradient times GRN's input y over the map.

    Returns:
        The gradient of gamma (C, ), and the factor (N, 1, 1, C) of y in the gradient of y.
    """
    mean = norm.mean(dim=-1, keepdim=True) + eps
    scale = norm / mean
    grad_gamma = (product * scale).sum(dim=(0, 1, 2))
    # The norm acts through the mean too.
    grad_scale = product * gamma
    grad_norm = (grad_scale - (grad_scale * scale).mean(dim=-1, keepdim=True)) / mean
    return grad_gamma, grad_norm / norm


class _GELUResponseNormLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.gelu(x)
        norm = _token_norm(y)
        ctx.save_for_backward(x, gamma, norm, weight)
        ctx.eps = eps
        return F.linear(y.mul_(_multiplier(norm, gamma, eps).to(y.dtype)), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, norm, weight = ctx.saved_tensors
        y = F.gelu(x)
        multiplier = _multiplier(norm, gamma, ctx.eps).to(x.dtype)
        spare = y * multiplier  # what the linear layer has read
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = flat.t() @ spare.flatten(0, 2)
        grad_bias = flat.sum(0)
        grad = (flat @ weight).view(x.shape)
        product = sum_tokens(torch.mul(grad, y, out=spare))
        grad_gamma, slope = _response_norm_backward(product, norm, gamma, ctx.eps)
        grad.mul_(multiplier).addcmul_(y, slope.to(y.dtype))
        return torch.ops.aten.gelu_backward(grad, x), grad_gamma.to(gamma.dtype), None, grad_weight, grad_bias
