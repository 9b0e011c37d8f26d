"""Folders of images, part of which is held out."""

from mmpretrain.datasets import CustomDataset

from ..registry import DATASETS

HELD_OUT_EVERY = 10


@DATASETS.register_module()
class SplitFolder(CustomDataset):
    """Images in ``train/CLASS/`` and ``test/CLASS/``; every tenth training image, class by class, can be held out.

    Args:
        data_root (str): Folder that holds both.
        split (str): 'train', 'test', or, to choose settings, 'train-part' and 'held-out', nine tenths and one tenth of
            the training images. Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmpretrain.datasets.CustomDataset`, such as ``pipeline``.

    Raises:
        ValueError: ``split`` is none of these.
    """

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        splits = ('train', 'test', 'train-part', 'held-out')
        if split not in splits:
            raise ValueError(f'split must be one of {", ".join(splits)}, but got {split!r}')
        self.split = split
        folder = 'test' if split == 'test' else 'train'
        test_mode = split in ('test', 'held-out')
        super().__init__(data_root=data_root, data_prefix=folder, test_mode=test_mode, **kwargs)

    def load_data_list(self) -> list[dict]:
        images = sorted(super().load_data_list(), key=lambda image: (image['gt_label'], image['img_path']))
        if self.split in ('train', 'test'):
            return images
        return [image for i, image in enumerate(images) if (i % HELD_OUT_EVERY == 0) == (self.split == 'held-out')]
