"""Detection from annotations as COCO (JSON) or PASCAL VOC (XML) has them."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..utils.files import write_file
from .images import (
    IMAGE_FOLDERS,
    SPLITS,
    VAL_SHARE,
    Size,
    describe_sizes,
    find_images,
    hold_out,
    listed,
    measure_all,
    require_folder,
    split_of,
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
)

MODELS = {  # and the configs that theirs inherit
    'faster-rcnn': 'faster-rcnn_strip-mlp-tiny-light_fpn_1x_coco',
    'dino': 'dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco',
}
SHORT_SIDE, LONG_SIDE = 800, 1333
SMALL, SMALL_EPOCHS, EPOCHS = 4000, 36, 12  # training images, epochs with fewer of them, and with more
DINO_SIDE = 320
WARM_UP = 1000  # iterations
NEEDED = {'images': {'id', 'file_name', 'width', 'height'}, 'annotations': {'image_id', 'category_id', 'bbox'}}
LEAST_SIDE = 32  # pixels; mmdet leaves smaller images out of trainings
VOC_FOLDERS = ('Annotations', 'JPEGImages')


class Split(NamedTuple):
    """Images of a split with their boxes.

    Attributes:
        content: As of COCO's JSON.
        root: Folder that the names of the images start from.
        file: The JSON file that holds the content; None: there is none yet.
    """

    content: dict
    root: Path
    file: Path | None


def write_detection(
    folder: str | Path,
    out: str | Path | None = None,
    init: str | Path | None = None,
    arch: str | None = None,
    size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    model: str = 'faster-rcnn',
) -> Written:
    """Write a config for images with boxes.

    The folder holds JSON files as of COCO, named by their split or in its folder (one file alone is split: a fifth of
    its images, seed 0, is held out), or ``Annotations``, ``JPEGImages`` and ``ImageSets/Main`` as of PASCAL VOC. What
    is not yet COCO's JSON for each split is written beside the config, boxes cut to their images. Classes are read.

    Args:
        folder: Folder of images and annotations.
        out: Folder for config and annotations. Defaults to ``own_data/{name of the folder}``.
        init: Checkpoint to start from, of a Strip-MLP or a model that has one. Defaults to random weights.
        arch: Name in ``StripMLP.arch_zoo``. Defaults to that of ``init``, else 'tiny-light'.
        size: Short side in pixels that images are resized to, the long one being at most 5 / 3 of it. Defaults to 800.
        epochs: Defaults to 12, or 36 with less than 4,000 training images.
        batch_size: Images in a step. Defaults to 2.
        model: 'faster-rcnn' (the default) or 'dino'.

    Raises:
        FileNotFoundError: The folder, the checkpoint or an image is missing.
        ValueError: The annotations cannot be read, have no classes or no boxes, or an argument is out of its range.
    """
    if model not in MODELS:
        raise ValueError(f'model must be one of {", ".join(MODELS)}, but got {model!r}')
    check_positive(size=size, epochs=epochs, batch_size=batch_size)
    if model == 'dino' and (size or SHORT_SIDE) < DINO_SIDE:
        raise ValueError(f'size must be at least {DINO_SIDE} for dino, which chooses 900 places, but got {size}')
    folder = require_folder(folder)
    splits, notes = (_read_voc if all((folder / name).is_dir() for name in VOC_FOLDERS) else _read_coco)(folder)
    if 'val' not in splits:
        splits.update(_hold_out(splits['train'], notes))
    classes = _classes(splits['train'], notes)
    for split, part in splits.items():
        _check(split, part, classes, notes)
    backbone = choose_backbone(arch, init)
    out = make_folder(out, folder)
    found = _found(folder, splits, classes) + notes
    for split, part in splits.items():
        if part.file is None:
            content = json.dumps(part.content).encode()
            write_file(out / f'{split}.json', lambda file, content=content: file.write(content))
            splits[split] = part._replace(file=out / f'{split}.json')
    lines = _config(splits, classes, backbone, model, size or SHORT_SIDE, epochs, batch_size or 2)
    return Written(write_config(out, f'{model}_strip-mlp-{backbone.name}_{out.name}', lines), found)


def _read_coco(folder: Path) -> tuple[dict[str, Split], list[str]]:
    images, others = find_images(folder)
    splits, files, notes = {}, {}, []
    for file in (path for path in others if path.suffix.lower() == '.json'):
        content = _coco_content(file)
        if content is None:
            notes.append(f'left out, as it has no boxes of COCO: {file}')
            continue
        split = split_of(file.stem) or _split_of_folders(file.relative_to(folder)) or 'train'
        if split in splits:
            raise ValueError(f'{files[split]} and {file} are both for {split}; keep one of them in {folder}')
        root = _image_root(file, content, images, split, notes, folder)
        _note_other_sizes(file, content, root, notes)
        complete = _complete(content['annotations'])
        if not complete:
            notes.append(f'written anew, with ids from 1, areas and iscrowd, as {file} has boxes without')
        splits[split], files[split] = Split(content, root, file if complete else None), file
    if not splits:
        raise ValueError(
            f'{folder} has no annotations: expected JSON files of COCO, or the folders Annotations and '
            'JPEGImages of PASCAL VOC'
        )
    if 'train' not in splits:
        raise ValueError(f'{folder} has annotations for {listed(splits)}, but none for train')
    return splits, notes


def _coco_content(file: Path) -> dict | None:
    """None of a JSON file of something else."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f'{file} is not JSON: {error}') from error
    if not isinstance(content, dict) or 'images' not in content or 'annotations' not in content:
        return None
    if not content.get('categories'):
        raise ValueError(f'{file} has no categories, by which COCO names its classes')
    if not content['images'] or not any('bbox' in box for box in content['annotations']):
        return None
    for key, needed in NEEDED.items():
        lacking = next((needed - set(item) for item in content[key] if needed - set(item)), None)
        if lacking:
            raise ValueError(f'{file} must have {listed(sorted(lacking))} in each of its {key}, as COCO has')
    return content


def _complete(boxes: list[dict]) -> bool:
    """Whether boxes have what COCO's evaluation reads; else they get it. It takes a box of id 0 for one not found."""
    ids = {box.get('id') for box in boxes}
    if len(ids) == len(boxes) and all(box.get('id') and {'area', 'iscrowd'} <= set(box) for box in boxes):
        return True
    for number, box in enumerate(boxes, 1):
        box['id'] = number
        box.setdefault('area', box['bbox'][2] * box['bbox'][3])
        box.setdefault('iscrowd', 0)
    return False


def _split_of_folders(path: Path) -> str | None:
    """The split that a folder on the way to a file speaks of."""
    return next(filter(None, map(split_of, path.parts[:-1][::-1])), None)


def _image_root(file: Path, content: dict, images: Sequence[Path], split: str, notes: list[str], folder: Path) -> Path:
    """The folder that the names of images in a JSON file start from."""
    names = sorted({PurePosixPath(image['file_name']).as_posix() for image in content['images']})
    known = {path.as_posix() for path in images}
    found = [path.removesuffix(names[0]) for path in sorted(known) if f'/{path}'.endswith(f'/{names[0]}')]
    if not found:
        raise FileNotFoundError(f'{file} speaks of {names[0]}, which is nowhere in its folder')
    lacking = {root: [name for name in names if root + name not in known] for root in found}
    nearest = min(found, key=lambda root: len(lacking[root]))
    if lacking[nearest]:
        raise FileNotFoundError(f'{file} speaks of {listed(lacking[nearest])}, not in {Path(nearest)} as the others')

    def fit(root: Path) -> tuple[bool, bool, bool]:
        way = (root / names[0]).relative_to(folder)
        named = any(part.lower() in IMAGE_FOLDERS for part in way.parts)
        return split == _split_of_folders(way), root == file.parent, named

    roots = [Path(root) for root in found if not lacking[root]]
    best, *others = sorted(roots, key=fit, reverse=True)
    if others and fit(best) == fit(others[0]):
        raise ValueError(
            f'{file} fits the images in {best} as well as those in {others[0]}; call one of these folders images'
        )
    if others:
        notes.append(f'images of {file.name}: in {best}, not {listed(others)}')
    return best


def _note_other_sizes(file: Path, content: dict, root: Path, notes: list[str]) -> None:
    """Note images whose boxes lie elsewhere, as their EXIF data turn them for instance."""
    sizes = measure_all([root / image['file_name'] for image in content['images']])
    found = [image['file_name'] for image in content['images'] if sizes[root / image['file_name']] != _size(image)]
    if found:
        notes.append(
            f'{len(found)} images are not of the size in {file}, so that their boxes may lie elsewhere: {listed(found)}'
        )


def _read_voc(folder: Path) -> tuple[dict[str, Split], list[str]]:
    lists = {path.stem: path for path in (folder / 'ImageSets' / 'Main').glob('*.txt')}
    files = {split: next((lists[name] for name in names if name in lists), None) for split, names in SPLITS.items()}
    root = folder / 'JPEGImages'
    images, _ = find_images(root)
    by_stem = {path.stem: path for path in images}
    stems = {split: _listed_stems(file, by_stem) for split, file in files.items() if file}
    stems = stems or {'train': sorted(path.stem for path in (folder / 'Annotations').glob('*.xml'))}
    if 'train' not in stems:
        raise ValueError(f'{folder / "ImageSets/Main"} must have train.txt or trainval.txt, but has {listed(lists)}')
    wanted = [name for names in stems.values() for name in names]
    missing = [name for name in wanted if name not in by_stem]
    if missing:
        raise FileNotFoundError(f'no image of {listed(missing)} in {root}')
    sizes = measure_all([by_stem[name] for name in wanted])
    objects = {name: _voc_objects(folder / 'Annotations' / f'{name}.xml') for name in wanted}
    names = sorted({name for boxes in objects.values() for name, _, _ in boxes})
    splits = {}
    for split, members in stems.items():
        files = {stem: by_stem[stem] for stem in members}
        splits[split] = Split(_voc_content(files, root, sizes, objects, names), root, None)
    return splits, []


def _listed_stems(file: Path, known: Collection[str]) -> list[str]:
    """Names in a list of VOC's, one a line; lists of one class have a number behind each."""
    lines = filter(None, map(str.strip, file.read_text().splitlines()))
    return [line if line in known else line.split()[0] for line in lines]


def _voc_content(
    files: dict[str, Path], root: Path, sizes: dict[Path, Size], objects: dict[str, list], names: list[str]
) -> dict:
    """As COCO's JSON: images, boxes cut to them, and classes."""
    content = dict(images=[], annotations=[], categories=[dict(id=i, name=name) for i, name in enumerate(names)])
    for number, (stem, file) in enumerate(files.items()):
        size = sizes[file]
        content['images'].append(
            dict(id=number, file_name=file.relative_to(root).as_posix(), width=size.width, height=size.height)
        )
        for name, corners, difficult in objects[stem]:
            x1, y1, x2, y2 = (min(max(value, 0), side) for value, side in zip(corners, (*size, *size)))
            box = dict(id=len(content['annotations']) + 1, image_id=number, category_id=names.index(name))
            box.update(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=difficult)
            content['annotations'].append(box)
    return content


def _voc_objects(file: Path) -> list[tuple[str, list[float], int]]:
    """Name, corners and difficulty of each box in an XML file."""
    try:
        found = []
        for node in ElementTree.parse(file).iter('object'):
            corners = [float(node.find(f'bndbox/{key}').text) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            found.append((node.find('name').text.strip(), corners, int(node.findtext('difficult') or 0)))
        return found
    except FileNotFoundError:
        raise FileNotFoundError(f'no annotation file {file}') from None
    except (ElementTree.ParseError, AttributeError, ValueError) as error:
        raise ValueError(f'{file} is not an annotation file as PASCAL VOC has them: {error}') from error


def _hold_out(train: Split, notes: list[str]) -> dict[str, Split]:
    """A fifth of the training images for validation."""
    if len(train.content['images']) < 2:
        raise ValueError('there must be at least two images, one of them for validation')
    notes.append(f'val: {VAL_SHARE:.0%} of the training images, held out')
    parts = {}
    for split, images in zip(('train', 'val'), hold_out(train.content['images'])):
        ids = {image['id'] for image in images}
        boxes = [box for box in train.content['annotations'] if box['image_id'] in ids]
        parts[split] = Split(dict(train.content, images=images, annotations=boxes), train.root, None)
    return parts


def _classes(train: Split, notes: list[str]) -> list[str]:
    """Names of the categories that have boxes, in their order."""
    categories = train.content['categories']
    counts = Counter(box['category_id'] for box in train.content['annotations'])
    unknown = sorted(set(counts) - {category['id'] for category in categories}, key=str)
    if unknown:
        raise ValueError(f'boxes have the category_id {listed(unknown)}, which no category has')
    empty = [category['name'] for category in categories if not counts[category['id']]]
    if empty:
        notes.append(f'left out, as classes without a training box: {listed(empty)}')
    names = [category['name'] for category in categories if counts[category['id']]]
    if len(set(names)) < len(names):
        raise ValueError(f'two categories have one name among {listed(sorted(names), 10)}')
    if not names:
        raise ValueError('no training image has a box')
    return names


def _check(split: str, part: Split, classes: Sequence[str], notes: list[str]) -> None:
    where = part.file or split
    names = [category['name'] for category in part.content['categories'] if category['name'] in classes]
    if names != list(classes):
        raise ValueError(
            f'{where} must have the categories of the training images in their order, {listed(classes, 10)}, '
            f'but has {listed(names, 10)}'
        )
    images = {image['id']: image for image in part.content['images']}
    lost = [box['image_id'] for box in part.content['annotations'] if box['image_id'] not in images]
    if lost:
        raise ValueError(f'{where} has boxes of the image_id {listed(lost)}, which no image has')
    flat, outside = [], []
    for box in part.content['annotations']:
        x, y, width, height = box['bbox']
        image = images[box['image_id']]
        if width < 1 or height < 1:
            flat.append(image['file_name'])
        elif x < -1 or y < -1 or x + width > image['width'] + 1 or y + height > image['height'] + 1:
            outside.append(image['file_name'])
    if split == 'train':
        filled = {box['image_id'] for box in part.content['annotations']}
        unused = [
            image['file_name']
            for image in part.content['images']
            if image['id'] not in filled or min(image['width'], image['height']) < LEAST_SIDE
        ]
        if unused:
            notes.append(
                f'train: {len(unused)} images without boxes, or with a side of less than {LEAST_SIDE} pixels, are not '
                f'trained on: {listed(unused)}'
            )
    if flat:
        notes.append(f'{split}: {len(flat)} boxes without area are not trained on, in {listed(dict.fromkeys(flat))}')
    if outside:
        notes.append(f'{split}: {len(outside)} boxes reach out of their image, in {listed(dict.fromkeys(outside))}')


def _config(
    splits: dict[str, Split],
    classes: list[str],
    backbone: Backbone,
    model: str,
    size: int,
    epochs: int | None,
    batch_size: int,
) -> list[str]:
    dino = model == 'dino'
    images = len(splits['train'].content['images'])
    epochs = epochs or (SMALL_EPOCHS if images < SMALL else EPOCHS)
    head = f'bbox_head=dict(num_classes={len(classes)})'
    # Statistics and scales of BN stand still where a checkpoint has them.
    norm = '' if backbone.init_cfg else ', norm_eval=False, norm_cfg=dict(requires_grad=True)'
    lines = [
        *base(f'detection/{MODELS[model]}'),
        *assign('classes', classes),
        *start(backbone),
        f'backbone = dict({backbone.arguments()}{norm})',
        f'neck = dict(in_channels={backbone.channels[dino:]})',
        f'model = dict(backbone=backbone, neck=neck, {head if dino else f"roi_head=dict({head})"})',
        *(_pipelines(size, 3 if dino else 2) if size != SHORT_SIDE else []),
        "data = dict(data_root='', metainfo=dict(classes=classes))",
    ]
    for loader in ('train', 'val', 'test'):
        part = splits.get(loader, splits['val'])
        pipeline = '' if size == SHORT_SIDE else f', pipeline={"train" if loader == "train" else "test"}_pipeline'
        batch = f'batch_size={batch_size}, ' if loader == 'train' else ''
        place = f'ann_file={part.file.as_posix()!r}, data_prefix=dict(img={part.root.as_posix()!r})'
        lines.append(f'{loader}_dataloader = dict({batch}dataset=dict({place}, **data{pipeline}))')
        if loader != 'train':
            lines.append(f'{loader}_evaluator = dict(ann_file={part.file.as_posix()!r})')
    lines.append(f'train_cfg = dict(max_epochs={epochs})')
    milestones = [round(epochs * share) for share in (2 / 3, 11 / 12)]
    if dino:
        lines.append(f'param_scheduler = [dict(_base_.param_scheduler[0], end={epochs}, milestones={milestones[1:]})]')
    else:
        warm_up = min(WARM_UP, math.ceil(epochs * images / batch_size / 10))
        lines.append(schedule(warm_up, end=epochs, milestones=milestones))
    return lines


def _pipelines(size: int, position: int) -> list[str]:
    scale = (round(size * LONG_SIDE / SHORT_SIDE), size)
    return [
        'train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline',
        f"resize = dict(_scope_='mmdet', type='Resize', scale={scale}, keep_ratio=True)",
        f'train_pipeline[{position}] = test_pipeline[1] = resize',
    ]


def _size(image: dict) -> Size:
    return Size(image['width'], image['height'])


def _found(folder: Path, splits: dict[str, Split], classes: Sequence[str]) -> list[str]:
    sizes = [_size(image) for part in splits.values() for image in part.content['images']]
    counts = Counter()
    for part in splits.values():
        names = {category['id']: category['name'] for category in part.content['categories']}
        counts.update(names[box['category_id']] for box in part.content['annotations'])
    parts = ', '.join(f'{len(splits[split].content["images"]):,} {split}' for split in SPLITS if split in splits)
    return [
        f'{folder}: {len(sizes):,} images, {describe_sizes(sizes)}: {parts}',
        f'boxes of {len(classes)} classes: ' + ', '.join(f'{counts[name]:,} {name}' for name in classes),
    ]
