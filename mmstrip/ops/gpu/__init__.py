"""Formulas and kernels for GPUs: subclasses of the paper's modules whose forward suits a compiled graph."""

from .kernels import MISSING

CLASSES: tuple[type, ...] = ()
if MISSING is None:
    from .channel_mixing import CompiledChannelMixingBlock
    from .local_strips import CompiledLocalStripMixing
    from .strip_mixing import CompiledCascadeGroupStripMixing, CompiledStripMixingBlock

    CLASSES = (
        CompiledCascadeGroupStripMixing,
        CompiledLocalStripMixing,
        CompiledStripMixingBlock,
        CompiledChannelMixingBlock,
    )
