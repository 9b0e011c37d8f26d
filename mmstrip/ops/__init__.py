"""Fast implementations of what Strip-MLP computes most, one file per operation, and the seam that lets them run.

Each file holds an operation's reference, its function on compiled operators (``csrc``) with its gradient, and, where
that saves memory in training, a function that needs no operators. Maps are (N, C, H, W), in channels_last memory.
"""

from .dispatch import IMPLEMENTATIONS, available, status, use

__all__ = ['IMPLEMENTATIONS', 'available', 'status', 'use']
