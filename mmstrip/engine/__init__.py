"""Running a training: hooks and loops of mmengine's Runner, what makes it resumable, and how it is launched."""

from . import hooks, layer_decay, loops, precision, sampler, workers

__all__ = ['hooks', 'layer_decay', 'loops', 'precision', 'sampler', 'workers']
