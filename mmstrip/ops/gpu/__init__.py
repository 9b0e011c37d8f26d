"""Formulas and Triton kernels for GPUs, by which blocks and the steps between stages compute in compiled graphs."""

from .kernels import MISSING

if MISSING is None:
    from .block import block_forward, has_formula, merge_maps
else:
    block_forward = has_formula = merge_maps = None

__all__ = ['MISSING', 'block_forward', 'has_formula', 'merge_maps']
