from .strip_mlp import StripMLP

__all__ = ['StripMLP']
