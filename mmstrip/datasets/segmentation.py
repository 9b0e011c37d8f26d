"""Images and label maps for segmentation."""

from mmseg.datasets import BaseSegDataset

from ..registry import DATASETS


@DATASETS.register_module()
class SegDataset(BaseSegDataset):
    """mmseg's BaseSegDataset, with ``metainfo`` also as METAINFO, where mmseg's confusion matrix looks for classes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.METAINFO = self.metainfo
