"""Activation checkpointing of blocks; BN counts a batch once, although a block runs twice."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def run_checkpointed(block: nn.Module, x: Tensor, **arguments) -> Tensor:
    """Run a block without saving its activations; the backward pass runs it again."""
    contexts = partial(_contexts, block)
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=contexts, **arguments)


def _contexts(block: nn.Module):
    return nullcontext(), _FrozenStatistics(block)


class _FrozenStatistics:
    """A context in which BN layers do not update their running statistics.

    It is reentrant, as second derivatives run a block once more.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        self.before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0

    def __exit__(self, *error) -> None:
        for norm, momentum, count in self.before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
