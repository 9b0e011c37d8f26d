"""Faster implementations of the modules of :mod:`mmstrip.models`, and the one call that lets them run.

One file per operation: the subclass of each module that it computes, its autograd Function, and its operators, which
are in ``csrc``. Maps are (N, C, H, W), in channels_last memory.
"""

from .accelerate import accelerate, restore, status, use
from .context import takes

__all__ = ['accelerate', 'restore', 'status', 'takes', 'use']
