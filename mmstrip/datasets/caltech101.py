"""The 80 / 20 split of Caltech-101 used for the small-data results."""

import os
import random
from pathlib import Path

from mmpretrain.datasets import CustomDataset
from PIL import Image

from ..registry import DATASETS

EXCLUDED = 'BACKGROUND_Google'
NUM_CLASSES, NUM_IMAGES = 101, 8677
TRAIN_SHARE = 0.8
SEED = 1024
SPLITS = ('train', 'test', 'train-part', 'held-out')
JPEG_QUALITY = 95


def split_caltech101(root: str | Path) -> dict[str, list[tuple[str, int]]]:
    """Split each class at random, the same way on every machine: listings are sorted, the seed is 1024.

    Args:
        root: Folder that holds ``101_ObjectCategories/``.

    Returns:
        'train' and 'test', each a list of (path below ``101_ObjectCategories``, class index); 'train-part' and
        'held-out', four fifths and one fifth of 'train' per class, to choose settings on; and 'classes', a list of
        (name, number of images) in the order of the indices.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It does not contain 101 classes and 8,677 images besides BACKGROUND_Google.
    """
    images_dir = Path(root) / '101_ObjectCategories'
    if not images_dir.is_dir():
        raise FileNotFoundError(f'no folder {images_dir}: {root} must contain 101_ObjectCategories/ of Caltech-101')
    classes = sorted(folder.name for folder in images_dir.iterdir() if folder.is_dir() and folder.name != EXCLUDED)
    files = {name: sorted(path.name for path in (images_dir / name).glob('*.jpg')) for name in classes}
    total = sum(map(len, files.values()))
    if (len(classes), total) != (NUM_CLASSES, NUM_IMAGES):
        raise ValueError(
            f'{images_dir} must contain {NUM_CLASSES} classes and {NUM_IMAGES:,} images besides {EXCLUDED}, '
            f'but contains {len(classes)} classes and {total:,} images'
        )
    generator = random.Random(SEED)
    split = {name: [] for name in SPLITS} | {'classes': [(name, len(files[name])) for name in classes]}
    for index, name in enumerate(classes):
        shuffled = list(files[name])
        generator.shuffle(shuffled)
        num_train = int(TRAIN_SHARE * len(shuffled))
        num_held_out = round((1 - TRAIN_SHARE) * num_train)
        parts = {
            'train': shuffled[:num_train],
            'test': shuffled[num_train:],
            'train-part': shuffled[num_held_out:num_train],
            'held-out': shuffled[:num_held_out],
        }
        for part, members in parts.items():
            split[part] += [(f'{name}/{file}', index) for file in sorted(members)]
    return split


def write_caltech101_split(root: str | Path) -> Path:
    """Write ``meta/{split}.txt`` (lines "path class") and ``meta/classes.txt`` below ``root``; return ``meta``."""
    split = split_caltech101(root)
    meta = Path(root) / 'meta'
    meta.mkdir(exist_ok=True)
    for part in SPLITS:
        (meta / f'{part}.txt').write_text(''.join(f'{path} {index}\n' for path, index in split[part]))
    (meta / 'classes.txt').write_text(''.join(f'{name}\n' for name, _ in split['classes']))
    return meta


def write_smaller_copy(root: str | Path, out: str | Path, short_side: int) -> Path:
    """Write a copy with smaller images and the same split, for short trainings at small image sizes.

    Larger images are scaled down (Lanczos) to a short side of ``short_side`` pixels; all are stored as JPEG of quality
    95. Existing files stay, so an interrupted copy can be continued.

    Args:
        root: Folder that holds ``101_ObjectCategories/``.
        out: Folder of the copy.
        short_side: Short side of the images in pixels.

    Returns:
        The ``meta`` folder of the copy.

    Raises:
        FileNotFoundError, ValueError: See :func:`split_caltech101`.
    """
    split = split_caltech101(root)
    for path, _ in split['train'] + split['test']:
        target = Path(out) / '101_ObjectCategories' / path
        if target.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix('.unfinished')
        with Image.open(Path(root) / '101_ObjectCategories' / path) as image:
            scale = min(1, short_side / min(image.size))
            smaller = image.convert('RGB').resize(
                [round(side * scale) for side in image.size], Image.Resampling.LANCZOS
            )
            smaller.save(unfinished, 'JPEG', quality=JPEG_QUALITY)
        os.replace(unfinished, target)
    return write_caltech101_split(out)


@DATASETS.register_module()
class Caltech101(CustomDataset):
    """Caltech-101 in the split that :func:`write_caltech101_split` wrote: 101 classes.

    mmpretrain's dataset of this name has 102 classes and 30 training images of each.

    Args:
        data_root (str): Folder that holds ``101_ObjectCategories/`` and ``meta/``.
        split (str): 'train', 'test', or, to choose settings, 'train-part' and 'held-out', four fifths and one fifth of
            the training images. Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmpretrain.datasets.CustomDataset`, such as ``pipeline``.

    Raises:
        FileNotFoundError: The split has not been written.
        ValueError: ``split`` is none of these.
    """

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        if split not in SPLITS:
            raise ValueError(f'split must be one of {", ".join(SPLITS)}, but got {split!r}')
        meta = Path(data_root) / 'meta'
        listed = meta / f'{split}.txt'
        if not listed.is_file():
            raise FileNotFoundError(
                f'no split file {listed}: write it with "python tools/dataset_converters/caltech101.py {data_root}"'
            )
        self.split = split
        super().__init__(
            data_root=data_root,
            data_prefix='101_ObjectCategories',
            ann_file=f'meta/{split}.txt',
            classes=str(meta / 'classes.txt'),
            test_mode=split in ('test', 'held-out'),
            **kwargs,
        )
