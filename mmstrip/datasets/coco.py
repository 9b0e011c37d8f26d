"""COCO annotations for detection."""

import os

from mmdet.datasets import CocoDataset as MMDetCocoDataset

from ..registry import DATASETS


@DATASETS.register_module()
class CocoDataset(MMDetCocoDataset):
    """mmdet's CocoDataset, with the annotation file's name in every error.

    Raises:
        FileNotFoundError: There is no annotation file.
        ValueError: It is not in COCO's format, or lacks a category of ``metainfo['classes']``.
    """

    def load_data_list(self) -> list[dict]:
        if '://' not in self.ann_file and not os.path.isfile(self.ann_file):
            raise FileNotFoundError(f'no annotation file {self.ann_file}')
        try:
            data_list = super().load_data_list()
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f'{type(error).__name__}: {error}'
            raise ValueError(f'{self.ann_file} is not a COCO annotation file ({reason})') from error
        classes = self.metainfo['classes']
        if len(self.cat_ids) != len(classes):
            raise ValueError(
                f'{self.ann_file} must contain the {len(classes)} categories {", ".join(classes)}, but contains only '
                f'{len(self.cat_ids)} of them'
            )
        return data_list
