"""Training: hooks and loops for mmengine's Runner, resuming and launching."""

from . import hooks, layer_decay, loops, precision, sampler, workers

__all__ = ['hooks', 'layer_decay', 'loops', 'precision', 'sampler', 'workers']
