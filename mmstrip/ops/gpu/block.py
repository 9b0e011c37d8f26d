"""A whole block as one formula."""

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from ...models.strip_mlp import StripMLPBlock
from .formula import channel_major, compute_type, is_formula


def block_forward(block: StripMLPBlock, x: Tensor, **valid: Tensor) -> Tensor:
    """What ``StripMLPBlock.forward`` computes, for graphs: channel-major from the first step to the last."""
    mixing = block.strip_mixing, block.channel_mixing
    if valid or type(block.drop_path) is not DropPath or not all(is_formula(m) and m.may_run(x) for m in mixing):
        return StripMLPBlock.forward(block, x, **valid)
    dtype = compute_type(x)
    x = channel_major(x)
    kept = _draw(block.drop_path, x)
    if x.dtype == dtype:
        y, x = block.strip_mixing.run_residual(x)
    else:
        y = block.strip_mixing.run(x.to(dtype))
    x = _add(x, y, kept, 0)
    y = block.channel_mixing.run(x.to(dtype))
    x = _add(x, y, kept, 1)
    return x.transpose(0, 1)


def _draw(drop_path: DropPath, x: Tensor) -> Tensor | None:
    """What drop path multiplies the images of both branches by, (2, N, 1, 1), drawn at once; None: nothing."""
    if not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    draw = torch.rand((2, x.shape[1], 1, 1), device=x.device)
    return (draw < keep).to(draw.dtype) / keep


def _add(x: Tensor, y: Tensor, kept: Tensor | None, branch: int) -> Tensor:
    return x + y if kept is None else (x + y * kept[branch]).to(x.dtype)
