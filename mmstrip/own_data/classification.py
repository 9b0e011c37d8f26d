"""Classification from folders of images, one for each class."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..models.arguments import MIN_SIDE
from .images import (
    SPLITS,
    VAL_SHARE,
    describe_sizes,
    find_images,
    hold_out,
    listed,
    measure,
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

IMG_SIZE = 224
CROP_SHARE = 224 / 256  # of the short side, in tests
LONG_SCHEDULE = 50  # epochs from which mixed images, RandAugment and erasing pay


def write_classification(
    folder: str | Path,
    out: str | Path | None = None,
    init: str | Path | None = None,
    arch: str | None = None,
    size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
) -> Written:
    """Write a config for images in folders, ``FOLDER/CLASS/*`` or ``FOLDER/{train,val,test}/CLASS/*``.

    Beside it, ``train.txt``, ``val.txt`` and, where there is one, ``test.txt`` list the images with their labels. Where
    no folder is for validation, a fifth of the training images of each class is held out (seed 0). Files that are no
    images or cannot be read are left out.

    Args:
        folder: Folder of the images.
        out: Folder for config and lists. Defaults to ``own_data/{name of the folder}``.
        init: Checkpoint to start from, of a Strip-MLP or a model that has one. Defaults to random weights.
        arch: Name in ``StripMLP.arch_zoo``. Defaults to that of ``init``, else 'tiny-light'.
        size: Side of the crops in pixels. Defaults to 224.
        epochs: Defaults to 100 from a checkpoint, 300 from scratch. With less than 50, images are cropped and
            flipped alone, and neither mixed nor distorted.
        batch_size: Images in a step. Defaults to 64, fewer where an epoch would have less than 20 steps.

    Raises:
        FileNotFoundError: The folder or the checkpoint is missing.
        ValueError: There are less than two classes, one has too few images or is not among those of the training
            images, or an argument is out of its range, the batch larger than the training set for instance.
    """
    check_positive(size=size, batch_size=batch_size)
    if epochs is not None and epochs < 2:
        raise ValueError(f'epochs must be at least 2, as the first is a warm-up, but got {epochs}')
    if (size or IMG_SIZE) < MIN_SIDE:
        raise ValueError(f'size must be at least {MIN_SIDE} pixels, but got {size}')
    folder, size = require_folder(folder), size or IMG_SIZE
    splits, odd = _read(folder)
    images = [image for samples in splits.values() for image, _ in samples]
    sizes, unreadable = measure(images)
    splits = {split: [sample for sample in samples if sample[0] in sizes] for split, samples in splits.items()}
    classes = _classes(folder, splits)
    if 'val' not in splits:
        splits['train'], splits['val'] = _hold_out_of_each(splits['train'], classes)
    images = len(splits['train'])
    if (batch_size or 1) > images:
        raise ValueError(f'batch_size must be at most the {images} training images of {folder}, but got {batch_size}')
    batch_size = batch_size or min(images, max(4, min(64, 2 ** (images // 20).bit_length() // 2)))
    backbone = choose_backbone(arch, init)
    out = make_folder(out, folder)
    for split, samples in splits.items():
        lines = [f'{image.relative_to(folder).as_posix()} {classes.index(name)}' for image, name in samples]
        write_lines(out / f'{split}.txt', lines)
    lines = _config(folder, out, sorted(splits), classes, backbone, size, epochs, batch_size)
    config = write_config(out, f'strip-mlp-{backbone.name}_{out.name}', lines)
    return Written(config, _found(folder, splits, classes, list(sizes.values()), odd, unreadable))


def _read(folder: Path) -> tuple[dict[str, list[tuple[Path, str]]], list[Path]]:
    """Images of each split with the names of their classes, and files that are no images."""
    roots = split_folders(folder)
    if roots and 'train' not in roots:
        raise ValueError(f'{folder} has {listed(path.name for path in roots.values())}, but no folder train')
    splits, odd = {}, []
    for split, root in (roots or {'train': folder}).items():
        images, others = find_images(root)
        odd += others
        loose = [image for image in images if image.parent == root]
        if loose:
            raise ValueError(f'{loose[0]} must be in the folder of its class, {root}/CLASS/')
        splits[split] = [(image, image.relative_to(root).parts[0]) for image in images]
    return splits, odd


def _classes(folder: Path, splits: dict[str, list[tuple[Path, str]]]) -> list[str]:
    roots = split_folders(folder)
    root = roots.get('train', folder)
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith('.'))
    counts = Counter(name for _, name in splits['train'])
    if len(names) < 2:
        raise ValueError(f'{root} must have a folder of images for each of at least two classes, but has {len(names)}')
    few = [name for name in names if counts[name] < (1 if 'val' in roots else 2)]
    if few:
        raise ValueError(
            f'{root / few[0]} must hold images that can be read, at least {1 if "val" in roots else 2}, '
            f'but has {counts[few[0]]}'
        )
    for split, samples in splits.items():
        unknown = sorted({name for _, name in samples} - set(names))
        if unknown:
            raise ValueError(f'{roots[split] / unknown[0]} is a class that {root} does not have')
        if not samples:
            raise ValueError(f'{roots[split]} has no images')
    return names


def _hold_out_of_each(samples: Sequence[tuple[Path, str]], classes: Sequence[str]):
    parts = [hold_out([sample for sample in samples if sample[1] == name]) for name in classes]
    return tuple([sample for part in side for sample in part] for side in zip(*parts))


def _config(
    folder: Path,
    out: Path,
    splits: Sequence[str],
    classes: list[str],
    backbone: Backbone,
    size: int,
    epochs: int | None,
    batch_size: int,
) -> list[str]:
    recipe, recipe_epochs, warm_up = ('finetune_100e', 100, 5) if backbone.init_cfg else ('300e_1xb128', 300, 20)
    epochs = epochs or recipe_epochs
    own = dict(img_size=size) if size % 32 == 0 else {}
    test = 'test' if 'test' in splits else 'val'
    short = epochs < LONG_SCHEDULE
    mixing = ', train_cfg=None' if short else ''
    lines = [
        *base(
            '_base_/models/strip-mlp-tiny-light',
            '_base_/datasets/folders_bs64_224',
            f'_base_/schedules/adamw_{recipe}',
            '_base_/default_runtime',
        ),
        *assign('classes', classes),
        *start(backbone),
        f'backbone = dict({backbone._replace(others=own | backbone.others).arguments()})',
        f'model = dict(backbone=backbone, head=dict(num_classes={len(classes)}, in_channels={backbone.channels[-1]})'
        f'{mixing})',
        f'data_preprocessor = dict(num_classes={len(classes)})',
        *_pipelines(size, short),
        f'data = dict(data_prefix={folder.as_posix()!r}, metainfo=dict(classes=classes))',
    ]
    for loader, split in (('train', 'train'), ('val', 'val'), ('test', test)):
        batch = f'batch_size={batch_size}, ' if loader == 'train' else ''
        pipeline = 'train_pipeline' if loader == 'train' else 'test_pipeline'
        file = (out / f'{split}.txt').as_posix()
        lines.append(f'{loader}_dataloader = dict({batch}dataset=dict(ann_file={file!r}, pipeline={pipeline}, **data))')
    if len(classes) <= 5:
        lines.append('val_evaluator = test_evaluator = dict(topk=1)')
    lines.append(f'train_cfg = dict(max_epochs={epochs})')
    if epochs != recipe_epochs:
        end = min(warm_up, math.ceil(epochs / 8))
        lines.append(schedule(end, begin=end))
    lines.append(f'auto_scale_lr = dict(base_batch_size={batch_size})')
    return lines


def _pipelines(size: int, short: bool) -> list[str]:
    """Pipelines of the recipe with crops of a size, a short training's without RandAugment and erasing."""
    lines = ['train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline']
    if size != IMG_SIZE:
        sides = f'{size}, {round(size / CROP_SHARE)}, {size}'
        lines.append(f'train_pipeline[1].scale, test_pipeline[1].scale, test_pipeline[2].crop_size = {sides}')
        lines.append('tta_pipeline = [*test_pipeline[:-1], _base_.tta_pipeline[-1]]')
    return [*lines, 'del train_pipeline[3:-1]  # RandAugment and RandomErasing'] if short else lines


def _found(folder, splits, classes, sizes, odd, unreadable) -> list[str]:
    counts = Counter(name for samples in splits.values() for _, name in samples)
    smallest, largest = min(classes, key=counts.get), max(classes, key=counts.get)
    parts = ', '.join(f'{len(splits[split]):,} {split}' for split in SPLITS if split in splits)
    held_out = '' if 'val' in split_folders(folder) else f' (val: {VAL_SHARE:.0%} of each class, held out)'
    found = [
        f'{folder}: {len(sizes):,} images of {len(classes)} classes, {describe_sizes(sizes)}: {parts}{held_out}',
        f'classes of {counts[smallest]} ({smallest}) to {counts[largest]} images ({largest})',
    ]
    if odd:
        found.append(f'left out, as no images: {listed(odd)}')
    if unreadable:
        found.append(f'left out, as they cannot be read: {listed(unreadable)}')
    return found
