"""Layers whose graphs are right at the size alone that they were traced at, in a form that is right at any size."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.windows import is_exporting


def prepare(model: nn.Module) -> None:
    """Let layers of a segmentor that cannot be exported at any size take another form while the tracer looks on."""
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
    """mmseg's Upsample computes sizes by ``int(side * 2.0)``, which the tracer takes for constants."""
    size = [side * int(layer.scale_factor) for side in x.shape[2:]]
    return F.interpolate(x, size, mode=layer.mode, align_corners=layer.align_corners)


def _pool(layer: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """Means of bins that depend on the size, as products with their weights: runtimes have no pooling of that kind."""
    height, width = nn.modules.utils._pair(layer.output_size)
    rows, columns = _bins(x.shape[2], height, x), _bins(x.shape[3], width, x)
    return rows @ x @ columns.T


def _bins(length: int, count: int, like: Tensor) -> Tensor:
    """Weights (count, length) of the means; bin i is from ``floor(i * length / count)`` to the end of the next's."""
    tokens, bins = torch.arange(length, device=like.device), torch.arange(count, device=like.device)[:, None]
    first, end = bins * length // count, ((bins + 1) * length + count - 1) // count
    inside = (tokens >= first) & (tokens < end)
    return inside.to(like.dtype) / (end - first)
