"""Folders of images: finding, measuring and splitting images."""

import os
import random
import re
import statistics
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from json import detect_encoding
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from ..utils.samples import IMAGE_SUFFIXES, inspect_image

SUFFIXES = (*IMAGE_SUFFIXES, '.ppm')
# Names that folders and files of a split may have.
SPLITS = {
    'train': ('train', 'training', 'trainval'),
    'val': ('val', 'valid', 'validation'),
    'test': ('test', 'testing'),
}
# Names that folders of images may have beside other folders.
IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'jpegimages', 'img_dir', 'leftimg8bit')
OUTPUTS = ('own_data', 'work_dirs')  # folders that our tools write to
SEED = 0
VAL_SHARE = 0.2
MAX_ASPECT_RATIO = 4
CONTROL = re.compile(r'[\x00-\x1f\x7f]')

Sample = TypeVar('Sample')


class Folder:
    """A user's folder. Each file is found once, however many links lead to it.

    The config goes to the folder ``out``, by default ``own_data/{name of the folder}``, which is not searched.
    """

    def __init__(self, path: str | Path, out: str | Path | None = None):
        if not Path(path).is_dir():
            raise FileNotFoundError(f'no folder at {path}')
        self.path = Path(path)
        self.notes: list[str] = []  # what the user should know, one sentence each
        name = re.sub(r'[^\w.-]+', '-', self.path.name or self.path.resolve().name)  # safe in shells
        self.out = Path(out or Path('own_data') / name)
        for place in (self.out, *self.out.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(f'out must be a folder, but {place} is a file')
        self._outputs = {os.path.realpath(place) for place in (*(self.path / name for name in OUTPUTS), self.out)}
        self._seen: set[str] = set()
        self._repeated: list[Path] = []

    def children(self, path: Path | None = None) -> list[Path]:
        """Folders in this folder or one below, sorted, without hidden ones and outputs of our tools."""
        paths = sorted(path for path in (path or self.path).iterdir() if path.is_dir() and path.name[0] != '.')
        return [path for path in paths if os.path.realpath(path) not in self._outputs]

    def files(self, path: Path | None = None) -> list[Path]:
        """Files below this folder or one in it, sorted, without those found before."""
        path = path or self.path
        found, waiting, links = [], deque([path]), deque()  # links last: they may lead to what is found anyway
        while waiting or links:
            item = (waiting or links).popleft()
            place = os.path.realpath(item)
            if place in self._seen:
                self._repeated.append(item)
            elif item == path or place not in self._outputs:
                self._seen.add(place)
                if item.is_dir():
                    for child in sorted(item.iterdir()):
                        if child.name[0] != '.':
                            (links if child.is_symlink() else waiting).append(child)
                elif item.is_file():
                    found.append(item)
        return sorted(found)

    def images(self, path: Path | None = None) -> tuple[list[Path], list[Path]]:
        """Images below this folder or one in it, by suffix, and the other files.

        Raises:
            ValueError: The path of an image has a line break or is not UTF-8.
        """
        files = self.files(path)
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        for image in images:
            if not is_single_line(str(image)):
                raise ValueError(f'{str(image)!r} must have a name in UTF-8 without line breaks; rename it')
        return images, [file for file in files if file.suffix.lower() not in SUFFIXES]

    def splits(self, path: Path | None = None) -> dict[str, Path]:
        """Folders of splits in this folder or one below; none if a single one stands beside other folders.

        Raises:
            ValueError: There are some, but none for training.
        """
        path = path or self.path
        children = self.children(path)
        found = {}
        for split, names in SPLITS.items():
            taken = set(map(os.path.realpath, found.values()))
            named = [child for name in names for child in children if child.name.lower() == name]
            named = [child for child in named if os.path.realpath(child) not in taken]
            found |= {split: named[0]} if named else {}
        others = [child for child in children if child not in found.values()]
        loose = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
        if len(found) == 1 and others:
            self.note_items('not taken for a split, as it is the only one', found.values())
            return {}
        if found and 'train' not in found:
            names = summarize(folder.name for folder in found.values())
            raise ValueError(f'{path} has {names}, but no folder train; add or rename one')
        self.note_items('left out, beside the folders of splits', [*others, *loose] if found else [])
        return found

    def note_items(self, words: str, items: Iterable) -> None:
        """Add a note about items, if there are any."""
        items = list(items)
        if items:
            self.notes.append(f'{words}: {summarize(items)}')

    def measure(self, images: Sequence[Path], strict: bool = True) -> dict[Path, tuple[int, int]]:
        """Sizes of images as training loads them; unusual images are noted.

        Raises:
            ValueError: An image cannot be read and ``strict`` is set; otherwise it is left out.
        """
        sizes, unreadable, deep = {}, [], []
        for image in progress(images, 'Reading sizes'):
            try:
                size, bits = inspect_image(image)
            except ValueError as error:
                if strict:
                    raise ValueError(f'{image} is not a readable image: {error}') from error
                unreadable.append(image)
                continue
            sizes[image] = size
            deep += [image] * (bits > 8)
        long = [image for image, size in sizes.items() if max(size) > MAX_ASPECT_RATIO * min(size)]
        self.note_items('left out, not readable', unreadable)
        self.note_items(f'{len(deep)} images of more than 8 bits, loaded as 8 (12-bit values become 0 to 15)', deep)
        self.note_items(f'{len(long)} images with sides over {MAX_ASPECT_RATIO}:1, cropped or shrunk in training', long)
        return sizes

    def hold_out(self, images: Sequence[Sample]) -> dict[str, list[Sample]]:
        """Hold out a fifth of the training images for validation, and note it; ValueError if there is only one."""
        if len(images) < 2:
            raise ValueError(f'{self.path} must have at least two images, as one is held out for validation')
        self.notes.append(f'val: {VAL_SHARE:.0%} of the training images, held out')
        return dict(zip(('train', 'val'), hold_out(images)))

    def report(self, what: str, sizes: Collection[tuple[int, int]], counts: dict[str, int], *more: str) -> list[str]:
        """What was found: first a line with the number of images, their sizes and the number per split."""
        words = ' x '.join(str(round(statistics.median(side))) for side in zip(*sizes))
        if len(set(sizes)) > 1:
            words += f' (median; sides of {min(map(min, sizes))} to {max(map(max, sizes))})'
        parts = ', '.join(f'{counts[split]:,} {split}' for split in SPLITS if split in counts)
        self.note_items('left out, links to files found before', self._repeated)
        return [f'{self.path}: {len(sizes):,} {what}, {words}: {parts}', *more, *self.notes]


def is_single_line(text: str) -> bool:
    """Whether a text fits on one line of a UTF-8 file."""
    return not {'\n', '\r'} & set(text) and not any('\ud800' <= letter <= '\udfff' for letter in text)


def check_names(names: Sequence[str], where: Path) -> None:
    """Raise ValueError for class names that are empty, repeated or not on one line."""
    for name, count in Counter(names).items():
        if not name.strip() or not is_single_line(name) or CONTROL.search(name):
            raise ValueError(f'{where} must name each class on one line of UTF-8 text, but has {name!r}')
        if count > 1:
            raise ValueError(f'{where} must name each class once, but has {name!r} {count} times')


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a text file without empty ones at its end.

    Raises:
        ValueError: It is not UTF-8 (or UTF-16 with a byte-order mark).
    """
    content = path.read_bytes()
    try:
        text = content.decode(detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} must be UTF-8 text: {error}') from error
    lines = [line.strip() for line in text.replace('\r\n', '\n').replace('\r', '\n').split('\n')]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def split_of(name: str) -> str | None:
    """The split that a folder or file is named after, such as 'val' for 'valid' or 'instances_val2017'."""
    words = set(''.join(letter if letter.isalpha() else ' ' for letter in name.lower()).split())
    return next((split for split, names in SPLITS.items() if words & set(names)), None)


def progress(paths: Sequence[Path], doing: str) -> Iterable[Path]:
    """Iterate over paths, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(paths, doing, console=console, transient=True, disable=not console.is_terminal)


def hold_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split off a random fifth of the samples (seed 0), at least one: the rest and the fifth, both in their order."""
    chosen = set(random.Random(SEED).sample(range(len(samples)), max(1, round(VAL_SHARE * len(samples)))))
    rest = [sample for i, sample in enumerate(samples) if i not in chosen]
    return rest, [samples[i] for i in sorted(chosen)]


def summarize(items: Iterable, limit: int = 3) -> str:
    """The first items as text, and how many more there are."""
    items = list(items)
    return ', '.join(map(str, items[:limit])) + (f' and {len(items) - limit} more' if len(items) > limit else '')
