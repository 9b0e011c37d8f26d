"""Faster implementations of the modules of :mod:`mmstrip.models`, and the one call that enables them.

One file per operation: the subclass of each module that it replaces, its autograd Function and its operators, whose
sources are in ``csrc``. Maps are (N, C, H, W), in channels_last memory.
"""

from .accelerate import accelerate, restore, status, use
from .context import takes

__all__ = ['accelerate', 'restore', 'status', 'takes', 'use']
