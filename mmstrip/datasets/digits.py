"""Handwritten digits that come with scikit-learn: real data without a download."""

from functools import lru_cache

import numpy as np
from mmpretrain.datasets import BaseDataset
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ..registry import DATASETS

NUM_TEST = 360
SPLIT_SEED = 0


@lru_cache(maxsize=1)
def split_digits() -> dict:
    """The 1,797 digits in a fixed split, stratified by class: 1,437 to train, 360 to test.

    Returns:
        'train' and 'test', each (images, labels, ids): uint8 (N, 8, 8), int (N, ), place in scikit-learn's data (N, ).
    """
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=NUM_TEST, stratify=digits.target, random_state=SPLIT_SEED
    )
    return {
        split: (images[ids], digits.target[ids], ids)
        for split, ids in (('train', np.sort(train)), ('test', np.sort(test)))
    }


@DATASETS.register_module()
class Digits(BaseDataset):
    """scikit-learn's handwritten digits, 8 x 8 grey levels, as (8, 8, 3) images in memory with ``gt_label``.

    Args:
        split (str): 'train' (1,437 images) or 'test' (360). Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmpretrain.datasets.BaseDataset`, such as ``pipeline``.

    Raises:
        ValueError: ``split`` is another word.
    """

    METAINFO = {'classes': tuple(str(digit) for digit in range(10))}

    def __init__(self, split: str = 'train', **kwargs):
        if split not in ('train', 'test'):
            raise ValueError(f"split must be 'train' or 'test', but got {split!r}")
        self.split = split
        super().__init__(ann_file='', test_mode=split == 'test', **kwargs)

    def load_data_list(self) -> list[dict]:
        images, labels, ids = split_digits()[self.split]
        return [
            dict(img=np.repeat(image[:, :, None], 3, axis=2), gt_label=int(label), img_path=f'digit_{index:04d}')
            for image, label, index in zip(images, labels, ids)
        ]
