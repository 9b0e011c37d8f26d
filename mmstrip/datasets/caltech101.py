"""The 80 / 20 split of Caltech-101 that the small-data results use."""

import random
from pathlib import Path

from mmpretrain.datasets import CustomDataset

from ..registry import DATASETS

EXCLUDED = 'BACKGROUND_Google'
NUM_CLASSES, NUM_IMAGES = 101, 8677
TRAIN_SHARE = 0.8
SEED = 1024


def split_caltech101(root: str | Path) -> dict[str, list[tuple[str, int]]]:
    """Split each class at random, the same way on every machine: listings are sorted, the seed is 1024.

    Args:
        root: Folder that holds ``101_ObjectCategories/``.

    Returns:
        'train' and 'test', each a list of (path below ``101_ObjectCategories``, class index), and 'classes', the
        names in the order of the indices with their number of images.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It does not hold 101 classes and 8,677 images besides BACKGROUND_Google.
    """
    images_dir = Path(root) / '101_ObjectCategories'
    if not images_dir.is_dir():
        raise FileNotFoundError(f'no folder {images_dir}: {root} must hold 101_ObjectCategories/ of Caltech-101')
    classes = sorted(folder.name for folder in images_dir.iterdir() if folder.is_dir() and folder.name != EXCLUDED)
    files = {name: sorted(path.name for path in (images_dir / name).glob('*.jpg')) for name in classes}
    total = sum(map(len, files.values()))
    if (len(classes), total) != (NUM_CLASSES, NUM_IMAGES):
        raise ValueError(
            f'{images_dir} must hold {NUM_CLASSES} classes and {NUM_IMAGES:,} images besides {EXCLUDED}, '
            f'but has {len(classes)} classes and {total:,} images'
        )
    generator = random.Random(SEED)
    split = {'train': [], 'test': [], 'classes': [(name, len(files[name])) for name in classes]}
    for index, name in enumerate(classes):
        shuffled = list(files[name])
        generator.shuffle(shuffled)
        num_train = int(TRAIN_SHARE * len(shuffled))
        split['train'] += [(f'{name}/{file}', index) for file in sorted(shuffled[:num_train])]
        split['test'] += [(f'{name}/{file}', index) for file in sorted(shuffled[num_train:])]
    return split


def write_caltech101_split(root: str | Path) -> Path:
    """Write ``meta/train.txt``, ``meta/test.txt`` ("path class" lines) and ``meta/classes.txt`` below ``root``.

    Returns:
        The ``meta`` folder.
    """
    split = split_caltech101(root)
    meta = Path(root) / 'meta'
    meta.mkdir(exist_ok=True)
    for part in ('train', 'test'):
        (meta / f'{part}.txt').write_text(''.join(f'{path} {index}\n' for path, index in split[part]))
    (meta / 'classes.txt').write_text(''.join(f'{name}\n' for name, _ in split['classes']))
    return meta


@DATASETS.register_module()
class Caltech101(CustomDataset):
    """Caltech-101 in the split that :func:`write_caltech101_split` wrote: 101 classes.

    mmpretrain's dataset of this name has 102 classes and 30 training images of each.

    Args:
        data_root (str): Folder that holds ``101_ObjectCategories/`` and ``meta/``.
        split (str): 'train' or 'test'. Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmpretrain.datasets.CustomDataset`, such as ``pipeline``.

    Raises:
        FileNotFoundError: The split has not been written.
        ValueError: ``split`` is another word.
    """

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        if split not in ('train', 'test'):
            raise ValueError(f"split must be 'train' or 'test', but got {split!r}")
        classes = Path(data_root) / 'meta' / 'classes.txt'
        if not classes.is_file():
            raise FileNotFoundError(
                f'no {classes}: write the split with "python tools/dataset_converters/caltech101.py {data_root}"'
            )
        self.split = split
        super().__init__(
            data_root=data_root,
            data_prefix='101_ObjectCategories',
            ann_file=f'meta/{split}.txt',
            classes=str(classes),
            test_mode=split == 'test',
            **kwargs,
        )
