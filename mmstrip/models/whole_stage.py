"""Stages of the deploy form as one compiled operator each, whose weights are brought in order once.

It runs where all of :mod:`.native` may run, and where nobody looks at what is inside of a stage: without gradients and
without hooks. What it keeps of a stage is as large as its weights, and is renewed when they change.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import native, ops
from .strip_mixing import BRANCHES
from .windows import counts_and_strides


class _Kept(NamedTuple):
    signature: list  # of the weights it was made from
    weights: list[Tensor]  # whose memory no others can take, so that a signature stays theirs
    stage: torch.ScriptObject  # in mmstrip/csrc/stage.cpp


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def run(stage: nn.Sequential, x: Tensor) -> Tensor | None:
    """A stage of deployed blocks, or None where that has to run block by block.

    Args:
        stage: :class:`.strip_mlp.StripMLPBlock` after block, each in its deploy form.
        x: (N, C, H, W).
    """
    if torch.is_grad_enabled() or not native.fits(x):
        return None
    kept = _renewed(stage)
    if kept is None:
        return None
    extent, size = stage[0].strip_mixing.branches['cgsmm'].extent, tuple(x.shape[2:])
    if size == extent:
        return kept.stage.run(x, (), ())
    if any(length < side for length, side in zip(size, extent)):
        return None
    return kept.stage.run(x, *counts_and_strides(size, extent))


def _renewed(stage: nn.Sequential) -> _Kept | None:
    """What is kept of a stage, from its weights as they are now."""
    weights = _weights(stage)
    if weights is None:
        return None
    kept = _kept.get(stage)
    signature = [(id(weight), weight.data_ptr(), ops.version(weight)) for weight in weights]
    if kept is None or kept.signature != signature:
        if not all(map(_is_standard, stage)) or not native.fits(*filter(torch.is_floating_point, weights)):
            return None
        kept = _kept[stage] = _Kept(signature, weights, _bring_in_order(stage))
    return kept


def _weights(stage: nn.Module) -> list[Tensor] | None:
    """All parameters and buffers, or None if a module trains or has hooks."""
    weights, modules = [], [stage]
    while modules:
        module = modules.pop()
        if module.training or module._forward_hooks or module._forward_pre_hooks:
            return None
        weights += [
            tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
        ]
        modules += [child for child in module._modules.values() if child is not None]
    return weights


def _is_standard(block: nn.Module) -> bool:
    """Whether a block is made of what the operator computes."""
    tokens, channels = block.strip_mixing, block.channel_mixing
    if not tokens.deployed or tuple(tokens.branches) != BRANCHES or not tokens.branches['cgsmm'].cascade:
        return False
    cgsmm, lsmm = tokens.branches.values()
    activations = tokens.depthwise[1], tokens.project[2], cgsmm.act, lsmm.reweight[1], channels.act
    folded = all(isinstance(norm, nn.Identity) for norm in (tokens.project[1], cgsmm.norm))
    return folded and ops.is_batch_norm(tokens.depthwise[0]) and all(map(ops.is_gelu, activations))


def _bring_in_order(stage: nn.Sequential) -> torch.ScriptObject:
    """The stage for the operator; its blocks are built alike."""
    tokens, channels = stage[0].strip_mixing, stage[0].channel_mixing
    states = [dict(block.state_dict()) for block in stage]
    return torch.classes.mmstrip.Stage(states, tokens.depthwise[0].eps, channels.norm.eps, channels.grn.eps)
