"""Running a training: hooks and loops of mmengine's Runner, what makes it resumable, and how it is launched."""

from . import hooks, loops, precision

__all__ = ['hooks', 'loops', 'precision']
