"""Random images from memory, to measure a training by without reading files."""

import torch
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

from mmstrip.registry import DATASETS

_DIFFERENT = 64  # images; the others are these again


@DATASETS.register_module()
class NoiseImages(Dataset):
    """Images of uniform noise with labels from 0 to ``num_classes - 1``, the same in each process.

    Args:
        length (int): Number of images.
        side (int): Height and width in pixels.
        num_classes (int): Defaults to 1000.
    """

    def __init__(self, length: int, side: int, num_classes: int = 1000):
        self.length = length
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (_DIFFERENT, 3, side, side), dtype=torch.uint8, generator=draw)
        self.labels = torch.randint(0, num_classes, (_DIFFERENT,), generator=draw)
        self.metainfo = dict(classes=[str(number) for number in range(num_classes)])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        place = index % _DIFFERENT
        return dict(inputs=self.images[place], data_samples=DataSample().set_gt_label(self.labels[place]))
