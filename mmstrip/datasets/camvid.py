"""CamVid (Brostow, Fauqueur, Cipolla, 2009): street scenes in the 11 classes used since SegNet."""

from mmseg.datasets import BaseSegDataset

from ..registry import DATASETS

COLORS = {
    'sky': (128, 128, 128),
    'building': (128, 0, 0),
    'pole': (192, 192, 128),
    'road': (128, 64, 128),
    'pavement': (60, 40, 222),
    'tree': (128, 128, 0),
    'sign': (192, 128, 128),
    'fence': (64, 64, 128),
    'car': (64, 0, 128),
    'pedestrian': (64, 64, 0),
    'bicyclist': (0, 128, 192),
    'void': (0, 0, 0),
}


@DATASETS.register_module()
class CamVid(BaseSegDataset):
    """CamVid in ``images/{split}/*.jpg`` and ``labels/{split}/*.png``; void, 11 in the label maps, is ignored.

    Args:
        data_root (str): Folder that holds both.
        split (str): 'train' (367 images), 'val' (101) or 'test' (233). Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmseg.datasets.BaseSegDataset`, such as ``pipeline``.

    Raises:
        ValueError: ``split`` is none of these.
    """

    METAINFO = dict(classes=tuple(COLORS), palette=[list(color) for color in COLORS.values()])

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        if split not in ('train', 'val', 'test'):
            raise ValueError(f'split must be one of train, val, test, but got {split!r}')
        super().__init__(
            data_root=data_root,
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'),
            metainfo=dict(classes=tuple(COLORS)[:-1]),
            test_mode=split != 'train',
            **kwargs,
        )
