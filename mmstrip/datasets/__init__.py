from .loading import LoadImage

__all__ = ['LoadImage']

try:
    from .caltech101 import Caltech101
    from .digits import Digits
except ModuleNotFoundError as error:  # detectors and segmentors run without mmpretrain
    if error.name != 'mmpretrain':
        raise
else:
    __all__ += ['Caltech101', 'Digits']
