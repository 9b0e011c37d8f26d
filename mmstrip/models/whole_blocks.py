"""Blocks as one compiled operator each, and stages of the deploy form as one, whose weights are brought in order once.

It runs where :mod:`.native` may run and nobody looks at what is inside of a block: without gradients, without hooks.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import native, ops
from .channel_mixing import GlobalResponseNorm
from .strip_mixing import BRANCHES, StripMLPLayer
from .windows import counts_and_strides


class _Kept(NamedTuple):
    signature: list[tuple]  # of the tensors it was made from
    tensors: list[dict[str, Tensor]]  # whose memory no others can take as long, so that the signature stays theirs
    stage: torch.ScriptObject


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def run(blocks: Sequence[nn.Module], x: Tensor, keep: bool = False) -> Tensor | None:
    """Blocks after each other, or None where they have to run step by step.

    Args:
        blocks: :class:`.strip_mlp.StripMLPBlock`, built alike.
        x: (N, C, H, W).
        keep: Keep their weights as the operator needs them, which takes as much memory again, until they change.
            Writing to ``.data`` of a weight is not noticed.
    """
    if not native.fits(x) or nn.modules.module._has_any_global_hook():
        return None
    tensors = [_tensors(block) for block in blocks]
    if None in tensors or not all(map(_is_standard, blocks)):
        return None
    extent, size = blocks[0].strip_mixing.branches['cgsmm'].extent, tuple(x.shape[2:])
    if any(length < side for length, side in zip(size, extent)):
        return None
    flat = [tensor for block in tensors for tensor in block.values()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *flat)):
        return None
    stage = _renewed(blocks, tensors, flat) if keep else _bring_in_order(blocks, tensors, flat)
    if stage is None:
        return None
    return stage.run(x, *counts_and_strides(size, extent))


def _tensors(block: nn.Module) -> dict[str, Tensor] | None:
    """Parameters and buffers by their names, or None if a module trains or has hooks."""
    tensors, modules = {}, [('', block)]
    while modules:
        prefix, module = modules.pop()
        if module.training or module._forward_hooks or module._forward_pre_hooks:
            return None
        for named in (module._parameters, module._buffers):
            for name, tensor in named.items():
                if tensor is not None:
                    tensors[prefix + name] = tensor
        modules += [(f'{prefix}{name}.', child) for name, child in module._modules.items() if child is not None]
    return tensors


def _is_standard(block: nn.Module) -> bool:
    """Whether a block is made of what the operator computes: of layers as they were built, none of them wrapped."""
    tokens, channels = block.strip_mixing, block.channel_mixing
    if tuple(tokens.branches) != BRANCHES or not tokens.branches['cgsmm'].cascade:
        return False
    cgsmm, lsmm = tokens.branches.values()
    layers = {
        nn.Conv2d: (
            *(tokens.depthwise[2], tokens.project[0], tokens.fuse, cgsmm.fuse_row, cgsmm.fuse_column),
            *(lsmm.tall, lsmm.wide, lsmm.reweight[0], lsmm.reweight[2], channels.depthwise),
        ),
        nn.Linear: (channels.fc1, channels.fc2),
        nn.LayerNorm: (channels.norm,),
        StripMLPLayer: (cgsmm.row, cgsmm.column),
        GlobalResponseNorm: (channels.grn,),
    }
    if not all(layer is None or type(layer) is kind for kind, some in layers.items() for layer in some):
        return False
    activations = tokens.depthwise[1], tokens.project[2], cgsmm.act, lsmm.reweight[1], channels.act
    folded = all(isinstance(norm, nn.Identity) or ops.is_batch_norm(norm) for norm in (tokens.project[1], cgsmm.norm))
    return folded and ops.is_batch_norm(tokens.depthwise[0]) and all(map(ops.is_gelu, activations))


def _renewed(blocks: nn.Sequential, tensors: list[dict[str, Tensor]], flat: list[Tensor]) -> torch.ScriptObject | None:
    """What is kept of blocks, made anew if a tensor is another one or has changed."""
    signature = [(id(tensor), tensor.data_ptr(), ops.version(tensor)) for tensor in flat]
    kept = _kept.get(blocks)
    if kept is None or kept.signature != signature:
        stage = _bring_in_order(blocks, tensors, flat)
        if stage is None:
            return None
        kept = _kept[blocks] = _Kept(signature, tensors, stage)
    return kept.stage


def _bring_in_order(
    blocks: Sequence[nn.Module], tensors: list[dict[str, Tensor]], flat: list[Tensor]
) -> torch.ScriptObject | None:
    """Blocks as the operator takes them (see mmstrip/csrc/stage.cpp), if it can."""
    if not native.fits(*filter(torch.is_floating_point, flat)):
        return None
    tokens, channels = blocks[0].strip_mixing, blocks[0].channel_mixing
    for block, named in zip(blocks, tensors):
        cgsmm = block.strip_mixing.branches['cgsmm']
        for name in ('position_row', 'position_column'):
            position = getattr(cgsmm, name)
            if position is not None:
                named[name] = position()
    return torch.classes.mmstrip.Stage(tensors, tokens.depthwise[0].eps, channels.norm.eps, channels.grn.eps)
