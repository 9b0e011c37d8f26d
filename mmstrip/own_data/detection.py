"""Detection from annotations in COCO (JSON) or PASCAL VOC (XML) format."""

import math
from collections import Counter, defaultdict
from pathlib import Path

from .annotations import Split, read_boxes
from .folders import Folder, check_names, summarize
from .writing import SplitFiles, Written, check_positive, choose_backbone, write_config

# Base config, first stage that the neck receives, index of Resize in the training pipeline, and fractions of the epochs
# after which the learning rate drops.
MODELS = {
    'faster-rcnn': ('faster-rcnn_strip-mlp-tiny-light_fpn_1x_coco', 0, 2, (2 / 3, 11 / 12)),
    'dino': ('dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco', 1, 3, (11 / 12,)),
}
SHORT_SIDE = 800
SMALL_DATASET, SMALL_EPOCHS, EPOCHS = 4000, 36, 12  # training images, epochs with fewer of them, and otherwise
DINO_SIDE = 320
MMDET_MIN_SIDE = 32  # pixels; mmdet does not train on smaller images
WARM_UP = 1000  # iterations
TEMPLATE = """\
_base_ = [__import__('mmstrip') and $base]
classes = $classes
size, epochs, batch_size = $size, $epochs, $batch_size

init = $init
backbone = dict(
    $backbone,
    init_cfg=init,
)
neck = dict(in_channels=$channels)
model = dict(
    backbone=backbone,
    neck=neck,
    $head,
)

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
if size != 800:  # of the short side
    resize = dict(_scope_='mmdet', type='Resize', scale=(round(size * 1333 / 800), size), keep_ratio=True)
    train_pipeline[$position] = test_pipeline[1] = resize

data = dict(data_root='', metainfo=dict(classes=classes))
$loaders
val_evaluator = dict(ann_file=val_dataloader['dataset']['ann_file'])
test_evaluator = dict(ann_file=test_dataloader['dataset']['ann_file'])

train_cfg = dict(max_epochs=epochs)
param_scheduler = [dict(step, end=$warm_up) for step in _base_.param_scheduler[:-1]]
param_scheduler.append(dict(_base_.param_scheduler[-1], end=epochs, milestones=$milestones))
"""


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

    The folder holds COCO JSON files, named after their split or in its folder, or ``Annotations``, ``JPEGImages`` and
    ``ImageSets/Main`` of PASCAL VOC. Without a validation split, a fifth of the training images is held out (seed 0).
    Splits that are not COCO JSON yet are written beside the config; boxes of VOC are clipped to their images. Classes
    come from the annotations.

    Args:
        folder: Folder of images and annotations.
        out, init, arch: See :func:`.write_classification`.
        size: Short side of resized images in pixels; the long side is at most 5 / 3 of it. Defaults to 800.
        epochs: Defaults to 12, or 36 with less than 4,000 training images.
        batch_size: Images per step. Defaults to 2.
        model: 'faster-rcnn' (the default) or 'dino'.

    Raises:
        FileNotFoundError: The folder, the checkpoint, an image or an annotation file is missing.
        ValueError: The annotations cannot be used or have no classes or boxes, a name or path cannot stand in a
            config, or an argument is invalid.
    """
    if model not in MODELS:
        raise ValueError(f'model must be one of {", ".join(MODELS)}, but got {model!r}')
    check_positive(size=size, epochs=epochs, batch_size=batch_size)
    if model == 'dino' and (size or SHORT_SIDE) < DINO_SIDE:
        raise ValueError(f'size must be at least {DINO_SIDE} for dino, which needs 900 positions, but got {size}')
    data = Folder(folder, out)
    splits = read_boxes(data)
    if 'val' not in splits:
        held_out = data.hold_out(splits['train'].content['images'])
        splits |= {split: _part(splits['train'], images) for split, images in held_out.items()}
    _check_disjoint(splits)
    classes = _classes(data, splits)
    boxes = {split: _count(data, split, part, classes) for split, part in splits.items()}
    backbone = choose_backbone(arch, init)
    base, stage, position, drops = MODELS[model]
    head = dict(bbox_head=dict(num_classes=len(classes)))
    images = len(splits['train'].content['images'])
    epochs, batch_size = epochs or (SMALL_EPOCHS if images < SMALL_DATASET else EPOCHS), batch_size or 2
    # BN is frozen only if a checkpoint provides its statistics.
    norm = {} if init else dict(norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False)
    parts = {
        split: SplitFiles(boxes[split], part.file or part.content, dict(data_prefix=dict(img=part.root)))
        for split, part in splits.items()
    }
    config = write_config(
        data,
        f'{model}_strip-mlp-{backbone.name}',
        TEMPLATE,
        parts,
        lambda sample, names: Counter(
            names[box['bbox_label']] for box in sample['instances'] if not box['ignore_flag']
        ),
        f'images without boxes, or with a side of less than {MMDET_MIN_SIDE} pixels,',
        base=f'mmstrip::detection/{base}.py',
        classes=classes,
        size=size or SHORT_SIDE,
        epochs=epochs,
        batch_size=batch_size,
        init=backbone.init_cfg,
        backbone=backbone.arguments(**norm),
        channels=backbone.channels[stage:],
        head=head if model == 'dino' else dict(roi_head=head),
        position=position,
        # LinearLR over one step would keep the first factor for good.
        warm_up=max(2, min(WARM_UP, math.ceil(epochs * images / batch_size / 10))),
        milestones=[round(epochs * share) for share in drops],
    )
    sizes = [(image['width'], image['height']) for part in splits.values() for image in part.content['images']]
    counts = {split: len(part.content['images']) for split, part in splits.items()}
    numbers = Counter(name for images in boxes.values() for count in images.values() for name in count.elements())
    words = f'boxes of {len(classes)} classes: ' + ', '.join(f'{numbers[name]:,} {name}' for name in classes)
    return Written(config, data.report('images', sizes, counts, words))


def _part(split: Split, images: list[dict]) -> Split:
    """Some images of a split with their boxes."""
    ids = {image['id'] for image in images}
    boxes = [box for box in split.content['annotations'] if box['image_id'] in ids]
    return Split(dict(split.content, images=images, annotations=boxes), split.root, None)


def _check_disjoint(splits: dict[str, Split]) -> None:
    """Raise ValueError for an image in two splits."""
    owners: dict[Path, str] = {}
    for split, part in splits.items():
        for image in part.images:
            if owners.setdefault(image, split) != split:
                raise ValueError(f'{image} must be in only one split, but is in {owners[image]} and {split}')


def _exclusion_reason(box: dict, image: dict) -> str | None:
    """Why mmdet does not train on a box; None if it does."""
    x, y, width, height = box['bbox']
    if box['iscrowd'] or box.get('ignore'):
        return 'of crowds, or marked as difficult or ignored,'
    if width < 1 or height < 1 or box['area'] <= 0:
        return 'without area'
    if min(x + width, image['width']) <= max(x, 0) or min(y + height, image['height']) <= max(y, 0):
        return 'outside of their image'
    return None


def _rows(part: Split) -> list[tuple[dict, dict, str, str | None]]:
    """Each box, its image, the name of its class, and why mmdet does not train on it; None if it does."""
    images = {image['id']: image for image in part.content['images']}
    names = {row['id']: row['name'] for row in part.content['categories']}
    boxes = [(box, images[box['image_id']], names[box['category_id']]) for box in part.content['annotations']]
    return [(box, image, name, _exclusion_reason(box, image)) for box, image, name in boxes]


def _classes(data: Folder, splits: dict[str, Split]) -> list[str]:
    """Names of the categories with boxes to train on, in their order; all splits must agree."""
    rows = _rows(splits['train'])
    used = {name for _, _, name, reason in rows if not reason}
    if not used:
        place = splits['train'].file or data.path
        reasons = f': all {len(rows)} are ignored, empty or outside their image' if rows else ''
        raise ValueError(f'{place} has no box to train on{reasons}')
    names = {split: [row['name'] for row in part.content['categories']] for split, part in splits.items()}
    classes = [name for name in names['train'] if name in used]
    check_names(classes, splits['train'].file or data.path)
    data.note_items('left out, classes without a training box', sorted(set(names['train']) - used))
    for split, part in splits.items():
        own = [name for name in names[split] if name in used]
        if own != classes:
            raise ValueError(
                f'{part.file or split} must have the categories of the training images, in the same order '
                f'({summarize(classes, 10)}), but has {summarize(own, 10) or "none of them"}'
            )
    return classes


def _count(data: Folder, split: str, part: Split, classes: list[str]) -> dict[Path, Counter]:
    """Count the boxes of each class to train on, per image; note the others and their reasons."""
    counts = {image['file_name']: Counter() for image in part.content['images']}
    odd = defaultdict(list)
    for box, image, name, reason in _rows(part):
        if not reason and name not in classes:
            reason = 'of classes that are left out'
        if reason:
            odd[f'boxes {reason} are not trained on'].append(image['file_name'])
            continue
        counts[image['file_name']][name] += 1
        x, y, width, height = box['bbox']
        if x < -1 or y < -1 or x + width > image['width'] + 1 or y + height > image['height'] + 1:
            odd['boxes reach out of their image'].append(image['file_name'])
    for words, files in odd.items():
        data.notes.append(f'{split}: {len(files)} {words}, in {summarize(dict.fromkeys(files))}')
    return {part.root / name: count for name, count in counts.items()}
