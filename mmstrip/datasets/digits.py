"""Handwritten digits that come with scikit-learn: real data without a download."""

import numpy as np
from mmpretrain.datasets import BaseDataset

from ..registry import DATASETS
from .digit_split import DIGITS, split_digits


@DATASETS.register_module()
class Digits(BaseDataset):
    """scikit-learn's handwritten digits, 8 x 8 gray levels, as (8, 8, 3) images in memory with ``gt_label``.

    Args:
        split (str): 'train' (1,437 images) or 'test' (360). Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmpretrain.datasets.BaseDataset`, such as ``pipeline``.

    Raises:
        ValueError: ``split`` is none of these.
    """

    METAINFO = {'classes': DIGITS}

    def __init__(self, split: str = 'train', **kwargs):
        if split not in ('train', 'test'):
            raise ValueError(f'split must be one of train, test, but got {split!r}')
        self.split = split
        super().__init__(ann_file='', test_mode=split == 'test', **kwargs)

    def load_data_list(self) -> list[dict]:
        images, labels, ids = split_digits()[self.split]
        return [
            dict(img=np.repeat(image[:, :, None], 3, axis=2), gt_label=int(label), img_path=f'digit_{index:04d}.png')
            for image, label, index in zip(images, labels, ids)
        ]
