"""Formulas and kernels for GPUs: subclasses of the paper's modules whose forward suits a compiled graph."""

from ...models.strip_mlp import StripMLPBlock
from .kernels import MISSING

__all__ = ['CLASSES', 'block_forward']

CLASSES: tuple[type, ...] = ()
block_forward = StripMLPBlock.forward
if MISSING is None:
    from .block import block_forward
    from .channel_mixing import FormulaChannelMixingBlock
    from .local_strips import FormulaLocalStripMixing
    from .strip_mixing import FormulaCascadeGroupStripMixing, FormulaStripMixingBlock

    CLASSES = (
        FormulaCascadeGroupStripMixing,
        FormulaLocalStripMixing,
        FormulaStripMixingBlock,
        FormulaChannelMixingBlock,
    )
