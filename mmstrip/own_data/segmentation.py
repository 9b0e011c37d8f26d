"""Segmentation from images and label maps."""

from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..utils.samples import IGNORED
from .images import (
    IMAGE_FOLDERS,
    SPLITS,
    VAL_SHARE,
    describe_sizes,
    find_images,
    hold_out,
    listed,
    measure_all,
    median_short_side,
    progress,
    require_folder,
    split_folders,
)
from .writing import (
    Backbone,
    Written,
    assign,
    base,
    check_positive,
    choose_backbone,
    make_folder,
    schedule,
    start,
    write_config,
    write_lines,
)

MODELS = {'fpn': '8xb2-80k', 'upernet': '8xb2-160k', 'segformer': '8xb2-160k'}  # and the configs of theirs
CROP_SIZE, LONG_SIDES = 512, 4  # pixels; the long side of an image over its short one, at most
EPOCHS = 100
LABEL_FOLDERS = ('labels', 'label', 'masks', 'mask', 'annotations', 'segmentationclass', 'ann_dir', 'gtfine')
CLASS_FILES = ('classes.txt', 'labels.txt')


class Split(NamedTuple):
    """Pairs of a split.

    Attributes:
        images: Folder of the images.
        labels: Folder of the label maps.
        names: What the two names of each pair share, paths below the two folders.
        suffixes: How the names of images and of label maps end.
    """

    images: Path
    labels: Path
    names: list[str]
    suffixes: tuple[str, str]


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

    The folder holds ``images`` and ``labels`` (or masks, annotations), each with a folder for each split or none (a
    fifth, seed 0, is held out then), or folders of splits that hold those. Beside the config, ``train.txt``,
    ``val.txt`` and, where there is one, ``test.txt`` list the names of the pairs. One number above the classes' is
    ignored, in training and in the metric.

    Args:
        folder: Folder of images and label maps.
        out: Folder for config and lists. Defaults to ``own_data/{name of the folder}``.
        init: Checkpoint to start from, of a Strip-MLP or a model that has one. Defaults to random weights.
        arch: Name in ``StripMLP.arch_zoo``. Defaults to that of ``init``, else 'tiny-light'.
        size: Side of the crops, and short side that test images are resized to, in pixels. Defaults to 512, or to the
            images' median short side where that is smaller, in multiples of 32.
        epochs: Defaults to 100.
        batch_size: Images in a step. Defaults to 4.
        model: 'fpn' (Semantic FPN, the default), 'upernet' or 'segformer'.
        classes: Text file of the classes' names, one a line. Defaults to ``classes.txt`` or ``labels.txt`` in the
            folder; without one, classes are numbered.

    Raises:
        FileNotFoundError: The folder, the checkpoint or the file of classes is missing.
        ValueError: There are no pairs, label maps have another size than their images or numbers of no class, or an
            argument is out of its range.
    """
    if model not in MODELS:
        raise ValueError(f'model must be one of {", ".join(MODELS)}, but got {model!r}')
    check_positive(size=size, epochs=epochs, batch_size=batch_size)
    folder = require_folder(folder)
    splits, notes = _read(folder)
    sizes = _sizes(splits)
    values = _values(splits)
    names, ignored = _classes(_class_file(folder, classes), values)
    backbone = choose_backbone(arch, init)
    out = make_folder(out, folder)
    for split, part in splits.items():
        write_lines(out / f'{split}.txt', part.names)
    size = size or min(CROP_SIZE, max(32, median_short_side(sizes) // 32 * 32))
    lines = _config(splits, out, names, ignored, backbone, model, size, epochs or EPOCHS, batch_size or 4)
    config = write_config(out, f'strip-mlp-{backbone.name}_{model}_{out.name}', lines)
    parts = ', '.join(f'{len(splits[split].names):,} {split}' for split in SPLITS if split in splits)
    found = [
        f'{folder}: {len(sizes):,} images with label maps, {describe_sizes(sizes)}: {parts}',
        f'{len(names)} classes: {listed(names, 20)}; pixels of {ignored} are ignored'
        + ('' if ignored in values else ' (there are none)'),
    ]
    unused = [name for number, name in enumerate(names) if number not in values]
    if unused:
        found.append(f'classes without a pixel: {listed(unused)}')
    return Written(config, found + notes)


def _read(folder: Path) -> tuple[dict[str, Split], list[str]]:
    places, notes = _places(folder), []
    splits = {split: _pairs(*place, notes) for split, place in places.items()}
    if 'train' not in splits:
        raise ValueError(f'{folder} has images for {listed(splits)}, but none for train')
    if 'val' not in splits:
        train = splits['train']
        if len(train.names) < 2:
            raise ValueError(f'{folder} must hold at least two images, one of them for validation')
        parts = hold_out(train.names)
        splits.update({split: train._replace(names=names) for split, names in zip(('train', 'val'), parts)})
        notes.append(f'val: {VAL_SHARE:.0%} of the training images, held out')
    return splits, notes


def _places(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Folders of images and label maps of each split."""
    pair = _image_and_label_folders(folder)
    if pair:
        images, labels = map(split_folders, pair)
        if not images:
            return {'train': pair}
        if set(images) != set(labels):
            raise ValueError(f'{pair[0]} has {listed(images)}, but {pair[1]} has {listed(labels) or "no splits"}')
        return {split: (images[split], labels[split]) for split in images}
    pairs = {split: _image_and_label_folders(path) for split, path in split_folders(folder).items()}
    if not pairs or not all(pairs.values()):
        raise ValueError(
            f'{folder} must have a folder of images ({", ".join(IMAGE_FOLDERS)}) and one of label maps '
            f'({", ".join(LABEL_FOLDERS)}), or folders train and val that have those'
        )
    return pairs


def _image_and_label_folders(folder: Path) -> tuple[Path, Path] | None:
    children = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    found = [[children[name] for name in names if name in children] for names in (IMAGE_FOLDERS, LABEL_FOLDERS)]
    return (found[0][0], found[1][0]) if all(found) else None


def _pairs(images: Path, labels: Path, notes: list[str]) -> Split:
    names = []
    for root in (images, labels):
        files, _ = find_images(root)
        suffixes = {path.suffix for path in files}
        if len(suffixes) != 1:
            raise ValueError(f'{root} must hold images of one kind, but has {listed(sorted(suffixes)) or "none"}')
        names.append(([path.relative_to(root).with_suffix('').as_posix() for path in files], suffixes.pop()))
    tails = ['', '']
    if not set(names[0][0]) & set(names[1][0]):  # such as 1_leftImg8bit.png and 1_gtFine_labelTrainIds.png
        tails = [commonprefix([name[::-1] for name in stems])[::-1] for stems, _ in names]  # noqa: RUF071, of letters
    found = [{name.removesuffix(tail) for name in stems} for (stems, _), tail in zip(names, tails)]
    shared = sorted(found[0] & found[1])
    if not shared:
        raise ValueError(f'no image in {images} has a label map of its name in {labels}')
    for root, alone in ((images, found[0] - found[1]), (labels, found[1] - found[0])):
        if alone:
            notes.append(f'left out, as they have no counterpart, of {root}: {listed(sorted(alone))}')
    return Split(images, labels, shared, tuple(tail + suffix for tail, (_, suffix) in zip(tails, names)))


def _files(split: Split, side: int) -> list[Path]:
    root = (split.images, split.labels)[side]
    return [root / f'{name}{split.suffixes[side]}' for name in split.names]


def _sizes(splits: dict[str, Split]) -> list:
    images, labels = ([file for part in splits.values() for file in _files(part, side)] for side in (0, 1))
    sizes = measure_all(images + labels)
    for image, label in zip(images, labels):
        if sizes[image] != sizes[label]:
            raise ValueError(
                f'{label} must have the {sizes[image].width} x {sizes[image].height} pixels of its image, but has '
                f'{sizes[label].width} x {sizes[label].height}'
            )
    return [sizes[image] for image in images]


def _values(splits: dict[str, Split]) -> dict[int, Path]:
    """Numbers in the label maps, each with a file that has it."""
    values = {}
    files = [file for part in splits.values() for file in _files(part, 1)]
    for file in progress(files, 'Reading label maps'):
        with Image.open(file) as image:
            labels = np.array(image)
        if labels.ndim != 2:
            raise ValueError(f'{file} must hold a class number in each pixel, but has colours (mode {image.mode})')
        found = np.unique(labels).tolist()
        wrong = [value for value in found if not 0 <= value <= 255]
        if wrong:
            raise ValueError(f'{file} must hold numbers from 0 to 255, but has {listed(wrong)}')
        for value in found:
            values.setdefault(int(value), file)
    return values


def _class_file(folder: Path, classes: str | Path | None) -> Path | None:
    if classes is not None and not Path(classes).is_file():
        raise FileNotFoundError(f'no file of classes {classes}')
    return (
        Path(classes) if classes else next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    )


def _classes(file: Path | None, values: dict[int, Path]) -> tuple[list[str], int]:
    """Names of the classes, and the number that is ignored."""
    numbers = sorted(set(values) - {IGNORED})
    if file is not None:
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        above = [number for number in numbers if number >= len(names)]
        if len(above) + (IGNORED in values) > 1:
            raise ValueError(
                f'{values[above[-1]]} must hold numbers from 0 to {len(names) - 1} as {file} names {len(names)} '
                f'classes, and at most one more, to be ignored, but has {listed(above, 5)}'
            )
        if len(names) < 2:
            raise ValueError(
                f'{file} must name at least two classes, the background among them, but names {listed(names)}'
            )
        return names, above[0] if above else IGNORED
    if numbers == [0] and IGNORED in values:
        raise ValueError(
            f'{values[IGNORED]} must hold class numbers, but is a mask of 0 and 255, and 255 stands for ignored '
            'pixels; write 1 for 255'
        )
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f'{values[numbers[-1]]} must hold class numbers from 0 without gaps, but the label maps have '
            f'{listed(numbers, 10)}; a file of names, classes.txt, allows gaps'
        )
    if len(numbers) < 2:
        raise ValueError(
            f'{values[0]} must hold at least two classes, as all label maps together, but all pixels are 0'
        )
    return [str(number) for number in numbers], IGNORED


def _config(
    splits: dict[str, Split],
    out: Path,
    classes: list[str],
    ignored: int,
    backbone: Backbone,
    model: str,
    size: int,
    epochs: int,
    batch_size: int,
) -> list[str]:
    iterations = max(2, epochs * max(1, len(splits['train'].names) // batch_size))
    interval, warm_up = max(1, iterations // 10), max(1, min(1500, iterations // 10))
    head = f'num_classes={len(classes)}, ignore_index={ignored}, norm_cfg=norm'
    heads = [f'decode_head=dict({head}' + ('' if model == 'fpn' else f', in_channels={backbone.channels}') + ')']
    if model == 'fpn':
        heads.append(f'neck=dict(in_channels={backbone.channels})')
    if model == 'upernet':
        heads.append(f'auxiliary_head=dict({head}, in_channels={backbone.channels[2]})')
    return [
        *base(f'segmentation/strip-mlp-tiny-light_{model}_{MODELS[model]}_ade20k-512x512'),
        *assign('classes', classes),
        *start(backbone),
        "norm = dict(type='BN')",
        f'backbone = dict({backbone.arguments()}, norm_cfg=norm)',
        f'data_preprocessor = dict(size=({size}, {size}), seg_pad_val={ignored})',
        'model = dict(\n    data_preprocessor=data_preprocessor,\n    backbone=backbone,\n    '
        + ',\n    '.join(heads)
        + ',\n)',
        'train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline',
        f'train_pipeline[2].scale = test_pipeline[1].scale = ({LONG_SIDES * size}, {size})',
        f'train_pipeline[3].update(crop_size=({size}, {size}), ignore_index={ignored})',
        'data = dict(',
        "    type='mmstrip.SegDataset', data_root='', metainfo=dict(classes=classes), reduce_zero_label=False, "
        f'ignore_index={ignored}',
        ')',
        *_loaders(splits, out, batch_size),
        f'val_evaluator = test_evaluator = dict(ignore_index={ignored})',
        f'optim_wrapper = dict(optimizer=dict(lr={2e-4 if backbone.init_cfg else 5e-4}))',
        f'train_cfg = dict(max_iters={iterations}, val_interval={interval})',
        schedule(warm_up, begin=warm_up, end=iterations),
        f'default_hooks = dict(checkpoint=dict(interval={interval}))',
    ]


def _loaders(splits: dict[str, Split], out: Path, batch_size: int) -> list[str]:
    lines = []
    for loader in ('train', 'val', 'test'):
        split = loader if loader in splits else 'val'
        part = splits[split]
        batch = f'batch_size={batch_size}, ' if loader == 'train' else ''
        lines += [
            f'{loader}_dataloader = dict({batch}dataset=dict(',
            f'    ann_file={(out / f"{split}.txt").as_posix()!r}, img_suffix={part.suffixes[0]!r}, '
            f'seg_map_suffix={part.suffixes[1]!r},',
            f'    data_prefix=dict(img_path={part.images.as_posix()!r}, seg_map_path={part.labels.as_posix()!r}),',
            f'    pipeline={"train" if loader == "train" else "test"}_pipeline, **data,',
            '))',
        ]
    return lines
