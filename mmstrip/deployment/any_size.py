"""Size-independent forms of layers whose traced graphs would only be correct at one size."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.windows import is_exporting


def prepare(model: nn.Module) -> None:
    """Make layers of a segmentor that tie a graph to one size use another form while they are traced."""
    for layer in model.modules():
        form = _form_of(layer)
        if form is not None:
            layer.forward = partial(_run, layer.forward, partial(form, layer))


def _run(forward, form, x: Tensor) -> Tensor:
    return form(x) if is_exporting() else forward(x)


def _form_of(layer: nn.Module):
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return _pool
    ours = type(layer).__module__ == 'mmseg.models.utils.wrappers' and type(layer).__name__ == 'Upsample'
    whole = ours and not layer.size and isinstance(layer.scale_factor, float) and layer.scale_factor.is_integer()
    return _upsample if whole else None


def _upsample(layer: nn.Module, x: Tensor) -> Tensor:
    """mmseg's Upsample computes sizes as ``int(side * 2.0)``, which the tracer makes constants."""
    size = [side * int(layer.scale_factor) for side in x.shape[2:]]
    return F.interpolate(x, size, mode=layer.mode, align_corners=layer.align_corners)


def _pool(layer: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """Adaptive average pooling as matrix products; runtimes have no such pooling for dynamic sizes."""
    height, width = nn.modules.utils._pair(layer.output_size)
    rows, columns = _bins(x.shape[2], height, x), _bins(x.shape[3], width, x)
    return rows @ x @ columns.T


def _bins(length: int, count: int, like: Tensor) -> Tensor:
    """Weights (count, length) of the means; bin i is floor(i * length / count) to ceil((i + 1) * length / count)."""
    tokens, bins = torch.arange(length, device=like.device), torch.arange(count, device=like.device)[:, None]
    first, end = bins * length // count, ((bins + 1) * length + count - 1) // count
    inside = (tokens >= first) & (tokens < end)
    return inside.to(like.dtype) / (end - first)
