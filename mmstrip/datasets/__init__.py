"""Datasets and transforms; those that build on a toolbox are there when the toolbox is."""

from importlib import import_module

from .digit_scenes import PlaceDigit
from .drawing import SeededSampler, shield_worker
from .loading import LoadImage

__all__ = ['LoadImage', 'PlaceDigit', 'SeededSampler', 'shield_worker']

_NEEDS_TOOLBOX = {
    'mmpretrain': {'caltech101': 'Caltech101', 'digits': 'Digits'},
    'mmdet': {'coco': 'CocoDataset'},
    'mmseg': {'seg_map': 'LoadSegMap'},
}

for _toolbox, _modules in _NEEDS_TOOLBOX.items():
    try:
        import_module(f'{_toolbox}.datasets')
    except (ImportError, AssertionError):  # not installed, or it refuses this mmcv: its own users see why
        continue
    for _module, _name in _modules.items():
        globals()[_name] = getattr(import_module(f'.{_module}', __name__), _name)
        __all__.append(_name)
