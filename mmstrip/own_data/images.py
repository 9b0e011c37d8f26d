"""Images in folders: finding, measuring and splitting them."""

import random
import statistics
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image
from rich.console import Console
from rich.progress import track

from ..utils.samples import IMAGE_SUFFIXES, size_of_image

SUFFIXES = (*IMAGE_SUFFIXES, '.ppm')
# Names that folders and files of a split have.
SPLITS = {
    'train': ('train', 'training', 'trainval'),
    'val': ('val', 'valid', 'validation'),
    'test': ('test', 'testing'),
}
# Names that folders of images have beside those of label maps or others.
IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'jpegimages', 'img_dir', 'leftimg8bit')
SEED = 0
VAL_SHARE = 0.2

Sample = TypeVar('Sample')


class Size(NamedTuple):
    """Size of an image in pixels."""

    width: int
    height: int


def require_folder(folder: str | Path) -> Path:
    """Raises FileNotFoundError where it is none."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder {folder}')
    return Path(folder)


def find_files(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Files below a folder, linked folders included, sorted; hidden ones do not count.

    Args:
        folder: The folder.
        above: The folders on the way to it, without links; one of them is not entered again.
    """
    place = folder.resolve()
    if place in above:
        return []
    files = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith('.')):
        if path.is_dir():
            files += find_files(path, (*above, place))
        elif path.is_file():
            files.append(path)
    return files


def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images below a folder by their suffixes, sorted, and the other files; hidden ones count as neither."""
    files = find_files(folder)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return images, [path for path in files if path.suffix.lower() not in SUFFIXES]


def split_of(name: str) -> str | None:
    """The split that the name of a folder or file speaks of, such as 'val' for 'valid' or 'instances_val2017'."""
    words = ''.join(letter if letter.isalpha() else ' ' for letter in name.lower()).split()
    return next((split for split, names in SPLITS.items() if set(words) & set(names)), None)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of splits in a folder, such as ``train`` and ``valid``."""
    found = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    named = {split: [found[name] for name in names if name in found] for split, names in SPLITS.items()}
    return {split: paths[0] for split, paths in named.items() if paths}


def progress(paths: Sequence[Path], doing: str) -> Iterable[Path]:
    """The paths, with a bar and the time left on a terminal."""
    console = Console(stderr=True)
    return track(paths, doing, console=console, transient=True, disable=not console.is_terminal)


def measure(paths: Sequence[Path]) -> tuple[dict[Path, Size], list[Path]]:
    """Sizes of images, turned as their EXIF data say, from their headers, and those whose header cannot be read."""
    sizes, unreadable = {}, []
    for path in progress(paths, 'Reading sizes'):
        try:
            with Image.open(path) as image:
                sizes[path] = Size(*size_of_image(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow's formats raise
            unreadable.append(path)
    return sizes, unreadable


def measure_all(paths: Sequence[Path]) -> dict[Path, Size]:
    """As :func:`measure`; raises ValueError for one that cannot be read."""
    sizes, unreadable = measure(paths)
    if unreadable:
        raise ValueError(f'{unreadable[0]} is not a readable image')
    return sizes


def hold_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """A fifth of the samples at random (seed 0), at least one, and the rest in its order.

    Returns:
        The rest, and the fifth.
    """
    chosen = set(random.Random(SEED).sample(range(len(samples)), max(1, round(VAL_SHARE * len(samples)))))
    rest = [sample for i, sample in enumerate(samples) if i not in chosen]
    return rest, [samples[i] for i in sorted(chosen)]


def describe_sizes(sizes: Collection[Size]) -> str:
    """Such as '640 x 480' of equal ones, 'of 300 x 180 (median; sides of 80 to 500)' else."""
    sides = [side for size in sizes for side in size]
    median = ' x '.join(str(round(statistics.median(side))) for side in zip(*sizes))
    return median if len(set(sizes)) == 1 else f'{median} (median; sides of {min(sides)} to {max(sides)})'


def listed(items: Iterable, limit: int = 3) -> str:
    """The first of some names or files."""
    items = list(items)
    return ', '.join(map(str, items[:limit])) + (f' and {len(items) - limit} more' if len(items) > limit else '')


def median_short_side(sizes: Collection[Size]) -> int:
    return round(statistics.median(min(size) for size in sizes))
