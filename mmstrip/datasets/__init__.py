"""Datasets and transforms, each imported on first use, because most need a toolbox."""

from importlib import import_module

_MODULES = {
    'Caltech101': 'caltech101',  # mmpretrain
    'CamVid': 'camvid',  # mmseg
    'CocoDataset': 'coco',  # mmdet
    'Digits': 'digits',  # mmpretrain
    'FashionMNIST': 'fashion_mnist',  # mmpretrain
    'PlaceDigit': 'digit_scenes',
    'RandAugment': 'transforms',  # mmpretrain
    'RandomErasing': 'transforms',
    'RandomFlip': 'transforms',
    'RandomResizedCrop': 'transforms',
    'SegDataset': 'segmentation',  # mmseg
    'SplitFolder': 'split_folder',  # mmpretrain
    'ToPlanes': 'planes',
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> type:
    """Raises an ImportError if the toolbox is missing."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)
