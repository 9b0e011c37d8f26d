"""The paper in ordinary PyTorch.

Read strip_mlp.py (Figure 2), strip_mixing.py (Figures 2 and 3), channel_mixing.py and windows.py; the other files
support them. Faster implementations are in :mod:`mmstrip.ops`; nothing here depends on them.
"""

from .averaging import ExponentialMovingAverage
from .strip_mlp import StripMLP

__all__ = ['ExponentialMovingAverage', 'StripMLP']
