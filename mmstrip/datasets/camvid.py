"""CamVid (Brostow, Fauqueur, Cipolla, 2009): street scenes in the 11 classes that SegNet and those after it use."""

from mmseg.datasets import BaseSegDataset

from ..registry import DATASETS

COLOURS = {
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
    """``images/{split}/*.jpg`` and ``labels/{split}/*.png``; void, 11 in the label maps, is ignored.

    Args:
        data_root (str): Folder that holds both.
        split (str): 'train' (367 images), 'val' (101) or 'test' (233). Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmseg.datasets.BaseSegDataset`, such as ``pipeline``.

    Raises:
        ValueError: ``split`` is another word.
    """

    METAINFO = dict(classes=tuple(COLOURS), palette=[list(colour) for colour in COLOURS.values()])

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        if split not in ('train', 'val', 'test'):
            raise ValueError(f"split must be 'train', 'val' or 'test', but got {split!r}")
        super().__init__(
            data_root=data_root,
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'),
            metainfo=dict(classes=tuple(COLOURS)[:-1]),
            test_mode=split != 'train',
            **kwargs,
        )
