"""Segmentation from images and label maps."""

import itertools
import re
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..utils.samples import IGNORED
from .folders import IMAGE_FOLDERS, Folder, check_names, progress, read_lines, summarize
from .writing import SplitFiles, Written, check_positive, choose_backbone, write_config

MODELS = {'fpn': '8xb2-80k', 'upernet': '8xb2-160k', 'segformer': '8xb2-160k'}  # and the schedules of their configs
CROP_SIZE, STEP = 512, 32  # pixels
EPOCHS = 100
LABEL_FOLDERS = ('labels', 'label', 'masks', 'mask', 'annotations', 'segmentationclass', 'ann_dir', 'gtfine')
CLASS_FILES = ('classes.txt', 'labels.txt')
LABELME_IGNORED = '__ignore__'  # the first line of labelme's file, for the label -1
TEMPLATE = """\
_base_ = [__import__('mmstrip') and $base]
classes = $classes
size, batch_size, iterations = $size, $batch_size, $iterations
ignored = $ignored  # the number in label maps that is not a class

data_preprocessor = dict(size=(size, size), seg_pad_val=ignored)
init = $init
backbone = dict(
    $backbone,
    init_cfg=init,
)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=backbone,
    $heads,
)

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (4 * size, size)
train_pipeline[3].update(crop_size=(size, size), ignore_index=ignored)

data = dict(
    type='mmstrip.SegDataset',
    data_root='',
    metainfo=dict(classes=classes),
    reduce_zero_label=False,
    ignore_index=ignored,
)
$loaders
val_evaluator = test_evaluator = dict(ignore_index=ignored)

optim_wrapper = dict(optimizer=dict(lr=$lr))
interval = max(1, iterations // 10)
warm_up = max(2, min(1500, interval))
train_cfg = dict(max_iters=iterations, val_interval=interval)
param_scheduler = [
    dict(_base_.param_scheduler[0], end=warm_up),
    dict(_base_.param_scheduler[1], begin=warm_up, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=interval))
"""


class Split(NamedTuple):
    """Pairs of a split; images come first in ``roots`` and ``suffixes``, label maps second."""

    roots: tuple[Path, Path]  # folders
    names: list[str]  # the common part of the two names of each pair, relative to the folders
    suffixes: tuple[str, str]  # endings of the names

    def pairs(self) -> dict[Path, Path]:
        """Images with their label maps."""
        return dict(tuple(map(Path, self.roots, map(name.__add__, self.suffixes))) for name in self.names)

    def dataset_arguments(self) -> dict:
        """The arguments by which a dataset finds the pairs."""
        prefix = dict(img_path=self.roots[0], seg_map_path=self.roots[1])
        return dict(img_suffix=self.suffixes[0], seg_map_suffix=self.suffixes[1], data_prefix=prefix)


def write_segmentation(
    folder: str | Path,
    out: str | Path | None = None,
    init: str | Path | None = None,
    arch: str | None = None,
    size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    model: str = 'fpn',
    classes: str | Path | None = None,
) -> Written:
    """Write a config for images with label maps, PNG files of class numbers from 0.

    The folder holds ``images`` and ``labels`` (or masks, annotations), with or without a folder per split, or folders
    of splits that hold those. Without a validation split, a fifth of the images is held out (seed 0). Beside the
    config, ``train.txt``, ``val.txt`` and, if there is a test split, ``test.txt`` list the names of the pairs. One
    number above those of the classes is ignored, in training and in the metric.

    Args:
        folder: Folder of images and label maps.
        out, init, arch: See :func:`.write_classification`.
        size: Side of the crops and short side of resized test images, in pixels. Defaults to 512, or to the images'
            median short side if that is smaller, in multiples of 32.
        epochs: Defaults to 100.
        batch_size: Images per step. Defaults to 4.
        model: 'fpn' (Semantic FPN, the default), 'upernet' or 'segformer'.
        classes: Text file of class names, one per line. Defaults to ``classes.txt`` or ``labels.txt`` in the
            folder; without one, classes are numbered.

    Raises:
        FileNotFoundError: The folder, the checkpoint or the file of classes is missing.
        ValueError: There are no pairs, label maps have another size than their images or numbers of no class, a name
            or path cannot stand in a config, or an argument is invalid.
    """
    if model not in MODELS:
        raise ValueError(f'model must be one of {", ".join(MODELS)}, but got {model!r}')
    check_positive(size=size, epochs=epochs, batch_size=batch_size)
    data = Folder(folder, out)
    splits = _read(data)
    sizes = data.measure([image for part in splits.values() for image in part.pairs()])
    values = _class_numbers(splits, sizes)
    names, ignored = _classes(data, classes, values)
    backbone = choose_backbone(arch, init)
    side, batch_size = int(median(map(min, sizes.values()))) // STEP * STEP, batch_size or 4
    config = write_config(
        data,
        f'strip-mlp-{backbone.name}_{model}',
        TEMPLATE,
        {split: SplitFiles(part.pairs(), part.names, part.dataset_arguments()) for split, part in splits.items()},
        lambda sample, _: Path(sample['seg_map_path']),
        base=f'mmstrip::segmentation/strip-mlp-tiny-light_{model}_{MODELS[model]}_ade20k-512x512.py',
        classes=names,
        size=size or min(CROP_SIZE, max(STEP, side)),
        batch_size=batch_size,
        iterations=max(3, (epochs or EPOCHS) * max(1, len(splits['train'].names) // batch_size)),
        ignored=ignored,
        init=backbone.init_cfg,
        backbone=backbone.arguments(norm_cfg=dict(type='BN')),
        heads=_heads(model, backbone.channels, len(names), ignored),
        lr=2e-4 if init else 5e-4,
    )
    data.note_items('classes without pixels', [name for number, name in enumerate(names) if number not in values])
    counts = {split: len(part.names) for split, part in splits.items()}
    words = f'{len(names)} classes: {summarize(names, 20)}; pixels of {ignored} are ignored'
    words += '' if ignored in values else ' (there are none)'
    return Written(config, data.report('images with label maps', sizes.values(), counts, words))


def _heads(model: str, channels: list[int], num_classes: int, ignored: int) -> dict:
    head = dict(num_classes=num_classes, ignore_index=ignored, norm_cfg=dict(type='BN'))
    if model == 'fpn':
        return dict(neck=dict(in_channels=channels), decode_head=head)
    heads = dict(decode_head=dict(in_channels=channels, **head))
    return heads | dict(auxiliary_head=dict(in_channels=channels[2], **head)) if model == 'upernet' else heads


def _read(data: Folder) -> dict[str, Split]:
    pair = _image_and_label_folders(data, data.path)
    if pair:
        roots = [data.splits(root) for root, _ in pair]
        if set(roots[0]) != set(roots[1]):
            names = [summarize(folders) or 'none' for folders in roots]
            raise ValueError(f'{pair[0][0]} has the splits {names[0]}, but {pair[1][0]} has {names[1]}')
        pairs = {split: [(side[split], files) for side, (_, files) in zip(roots, pair)] for split in roots[0]}
        pairs = pairs or {'train': pair}
    else:
        pairs = {split: _image_and_label_folders(data, path) for split, path in data.splits().items()}
    if not pairs or not all(pairs.values()):
        raise ValueError(
            f'{data.path} must have a folder of images ({", ".join(IMAGE_FOLDERS)}) and one of label maps '
            f'({", ".join(LABEL_FOLDERS)}), or folders train and val that contain both'
        )
    splits = {split: _pairs(data, *sides) for split, sides in pairs.items()}
    if 'val' not in splits:
        train = splits['train']
        splits |= {split: train._replace(names=names) for split, names in data.hold_out(train.names).items()}
    return splits


def _image_and_label_folders(data: Folder, folder: Path) -> list[tuple[Path, list[Path]]] | None:
    """The folders of images and of label maps in a folder, and the image files in them."""
    children, sides = data.children(folder), []
    for kind, names in (('images', IMAGE_FOLDERS), ('label maps', LABEL_FOLDERS)):
        named = [child for name in names for child in children if child.name.lower() == name]
        found = [(child, files) for child in named if (files := data.images(child)[0])]
        if not found:
            return None
        sides.append(found[0])
        data.note_items(f'{kind} are those in {found[0][0]}, not in', [path for path in named if path != found[0][0]])
    return sides


def _pairs(data: Folder, *sides: tuple[Path, list[Path]]) -> Split:
    roots, stems, suffixes = [], [], []
    for root, files in sides:
        files = [file.relative_to(root) for file in files if root in file.parents]
        kinds = sorted({file.suffix for file in files})
        if len(kinds) != 1:
            raise ValueError(f'{root} must hold images with one suffix, but has {summarize(kinds) or "no images"}')
        roots.append(root)
        stems.append([file.with_suffix('').as_posix() for file in files])
        suffixes.append(kinds[0])

    def bare(endings: Sequence[str]) -> list[set[str]]:
        return [{stem.removesuffix(ending) for stem in names} for ending, names in zip(endings, stems)]

    # Such as '_leftImg8bit' and '_labelTrainIds', unless names are the same.
    possible = [('', '')] if set(stems[0]) & set(stems[1]) else itertools.product(*map(_endings, stems))
    endings = max(possible, key=lambda endings: len(set.intersection(*bare(endings))))
    shared = sorted(set.intersection(*bare(endings)))
    if not shared:
        raise ValueError(f'no image in {roots[0]} has a label map of the same name in {roots[1]}')
    if any(name != name.strip() for name in shared):
        raise ValueError(f'names in {roots[0]} must not begin or end with a space; rename them')
    for root, names in zip(roots, bare(endings)):
        data.note_items(f'left out, without a counterpart, of {root}', sorted(names - set(shared)))
    split = Split(tuple(roots), shared, tuple(map(str.__add__, endings, suffixes)))
    data.note_items('pairs, such as', [' and '.join(map(str, pair)) for pair in split.pairs().items()][: any(endings)])
    return split


def _endings(stems: Sequence[str]) -> list[str]:
    """Possible common endings of all names, from the start of a word or number, longest first, empty last."""
    shared = len(commonprefix([stem[::-1] for stem in stems]))  # noqa: RUF071, of characters
    parts = [{len(stem) - part.start() for part in re.finditer(r'[^\W\d_]+|\d+|.', stem)} for stem in stems]
    lengths = {length for length in set.intersection(*parts) if length <= shared} - set(map(len, stems))
    return [stems[0][-length:] for length in sorted(lengths, reverse=True)] + ['']


def _class_numbers(splits: dict[str, Split], sizes: dict[Path, tuple[int, int]]) -> dict[int, Path]:
    """Numbers in the label maps, each with a file that has it."""
    values: dict[int, Path] = {}
    pairs = {labels: sizes[image] for part in splits.values() for image, labels in part.pairs().items()}
    for file in progress(list(pairs), 'Reading label maps'):
        found = _numbers_in(file, pairs[file])
        wrong = [value for value in found if value not in range(256)]
        if wrong:
            raise ValueError(f'{file} must hold class numbers from 0 to 255, but has {summarize(wrong)}')
        for value in found:
            values.setdefault(int(value), file)
    return values


def _numbers_in(file: Path, size: tuple[int, int]) -> list[int]:
    """Numbers in a label map, as mmseg reads it; one that differs in size from its image is not decoded."""
    try:
        with Image.open(file) as image:
            if image.size == size:
                if image.mode in ('L', 'P'):
                    return [number for _, number in image.getcolors()]
                labels = np.array(image)
    except Exception as error:  # each format has its own errors
        raise ValueError(f'{file} is not a readable label map: {error}') from error
    if image.size != size:
        raise ValueError(
            f'{file} must have the {size[0]} x {size[1]} pixels of its image, but has {image.width} x {image.height}'
        )
    if labels.ndim != 2:
        raise ValueError(f'{file} must hold one class number per pixel, but has colors (mode {image.mode})')
    return np.unique(labels).tolist()


def _classes(data: Folder, classes: str | Path | None, values: dict[int, Path]) -> tuple[list[str], int]:
    """Names of the classes, and the number that is ignored."""
    if classes is not None and not Path(classes).is_file():
        raise FileNotFoundError(f'no file of class names at {classes}')
    files = [Path(classes)] if classes else [data.path / name for name in CLASS_FILES if (data.path / name).is_file()]
    numbers = sorted(set(values) - {IGNORED})
    if numbers == [0] and IGNORED in values:
        raise ValueError(
            f'{values[IGNORED]} must hold class numbers, but is a mask of 0 and 255, and 255 means ignored; write 1 '
            'instead of 255'
        )
    names = _names(data, files) if files else [str(number) for number in numbers]
    if not files and numbers != list(range(len(numbers))):
        raise ValueError(
            f'{values[numbers[-1]]} must hold class numbers from 0 without gaps, but the label maps have '
            f'{summarize(numbers, 10)}; to allow gaps, name the classes in a file classes.txt'
        )
    above = [number for number in numbers if number >= len(names)]
    if len(above) + (IGNORED in values) > 1:
        others = summarize([*above, *[IGNORED] * (IGNORED in values)], 5)
        raise ValueError(
            f'{values[above[-1]]} must hold numbers from 0 to {len(names) - 1}, as {files[0]} names {len(names)} '
            f'classes, and at most one more number, which is ignored, but the label maps have {others}'
        )
    if len(numbers) - len(above) < 2:
        raise ValueError(
            f'{next(iter(values.values()))} and the other label maps must have at least two classes together, but have '
            f'only {summarize(sorted(values))}' + ', one of which is ignored' * (len(values) > 1)
        )
    return names, above[0] if above else IGNORED


def _names(data: Folder, files: Sequence[Path]) -> list[str]:
    file, names = files[0], read_lines(files[0])
    data.note_items(f'names of classes from {file}, not', files[1:])
    if names[:1] == [LABELME_IGNORED]:
        data.notes.append(f'{file} begins with {LABELME_IGNORED}, which is not a class')
        del names[0]
    if len(names) < 2:
        found = summarize(names) or 'none'
        raise ValueError(f'{file} must name at least two classes, including the background, but names {found}')
    check_names(names, file)
    return names
