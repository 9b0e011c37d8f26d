"""Classification from folders of images, one per class."""

from collections import Counter
from pathlib import Path

from ..models.arguments import MIN_SIDE
from .folders import VAL_SHARE, Folder, check_names, hold_out
from .writing import SplitFiles, Written, check_positive, choose_backbone, write_config

IMG_SIZE = 224
TEMPLATE = """\
_base_ = [
    __import__('mmstrip') and 'mmstrip::_base_/models/strip-mlp-tiny-light.py',
    'mmstrip::_base_/datasets/folders_bs64_224.py',
    $schedule,
    'mmstrip::_base_/default_runtime.py',
]
classes = $classes
size, epochs, batch_size = $size, $epochs, $batch_size

init = $init
backbone = dict(
    $backbone,
    init_cfg=init,
)
model = dict(backbone=backbone, head=dict(num_classes=$num_classes, in_channels=$channels))
data_preprocessor = dict(num_classes=$num_classes)

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[1].scale = test_pipeline[2].crop_size = size
test_pipeline[1].scale = round(size * 256 / 224)
tta_pipeline = [*test_pipeline[:-1], _base_.tta_pipeline[-1]]
if epochs < 50:  # too few for mixed images, RandAugment and erasing
    model.update(train_cfg=None)
    del train_pipeline[3:-1]

data = dict(data_prefix=$folder, metainfo=dict(classes=classes))
$loaders
val_evaluator = test_evaluator = dict(topk=$topk)

train_cfg = dict(max_epochs=epochs)
warm_up = min($warm_up, -(-epochs // 8))
param_scheduler = [dict(_base_.param_scheduler[0], end=warm_up), dict(_base_.param_scheduler[1], begin=warm_up)]
if warm_up * $steps == 1:  # LinearLR over one step would keep its factor for good
    param_scheduler[0].update(start_factor=1.0)
auto_scale_lr = dict(base_batch_size=batch_size)
"""

Samples = list[tuple[Path, str]]


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

    Beside it, ``train.txt``, ``val.txt`` and, if there is a test split, ``test.txt`` list the images with their labels.
    Without a validation folder, a fifth of the training images of each class is held out (seed 0). Files that are not
    images or cannot be read are left out.

    Args:
        folder: Folder of the images.
        out: Folder for config and lists. Defaults to ``own_data/{name of the folder}``.
        init: Checkpoint to start from, of a Strip-MLP or a model that has one. Defaults to random weights.
        arch: Name in ``StripMLP.arch_zoo``. Defaults to that of ``init``, else 'tiny-light'.
        size: Side of the crops in pixels. Defaults to 224.
        epochs: Defaults to 100 from a checkpoint, 300 from scratch. With less than 50, images are only cropped and
            flipped.
        batch_size: Images per step. Defaults to 64, or less if an epoch would have less than 20 steps.

    Raises:
        FileNotFoundError: The folder or the checkpoint is missing.
        ValueError: There are less than two classes, a class has too few images or no training images, a name or path
            cannot stand in a config, or an argument is invalid.
    """
    check_positive(size=size, epochs=epochs, batch_size=batch_size)
    if epochs is not None and epochs < 2:
        raise ValueError(f'epochs must be at least 2, as the first one is a warm-up, but got {epochs}')
    if (size or IMG_SIZE) < MIN_SIDE:
        raise ValueError(f'size must be at least {MIN_SIDE} pixels, but got {size}')
    data, size = Folder(folder, out), size or IMG_SIZE
    roots = data.splits() or {'train': data.path}
    splits = {split: _read(data, root) for split, root in roots.items()}
    sizes = data.measure([image for samples in splits.values() for image, _ in samples], strict=False)
    splits = {split: [sample for sample in samples if sample[0] in sizes] for split, samples in splits.items()}
    classes = _classes(data, roots, splits)
    if 'val' not in splits:
        data.notes.append(f'val: {VAL_SHARE:.0%} of each class, held out')
        parts = [hold_out([sample for sample in splits['train'] if sample[1] == name]) for name in classes]
        splits['train'], splits['val'] = ([sample for part in side for sample in part] for side in zip(*parts))
    count = len(splits['train'])
    if (batch_size or 1) > count:
        raise ValueError(f'batch_size must be at most {count}, the training images of {folder}, but got {batch_size}')
    batch_size = batch_size or min(count, max(4, min(64, 2 ** (count // 20).bit_length() // 2)))
    backbone = choose_backbone(arch, init)
    recipe, default_epochs, warm_up = ('finetune_100e', 100, 5) if init else ('300e_1xb128', 300, 20)
    config = write_config(
        data,
        f'strip-mlp-{backbone.name}',
        TEMPLATE,
        {split: SplitFiles(dict(samples), _lines(data.path, samples, classes)) for split, samples in splits.items()},
        lambda sample, names: names[sample['gt_label']],
        classes=classes,
        schedule=f'mmstrip::_base_/schedules/adamw_{recipe}.py',
        size=size,
        epochs=epochs or default_epochs,
        batch_size=batch_size,
        init=backbone.init_cfg,
        backbone=backbone.arguments(**(dict(img_size=size) if size % MIN_SIDE == 0 else {})),
        num_classes=len(classes),
        channels=backbone.channels[-1],
        folder=data.path,
        topk=(1, 5) if len(classes) > 5 else 1,
        warm_up=warm_up,
        steps=count // batch_size,
    )
    numbers = Counter(name for samples in splits.values() for _, name in samples)
    smallest, largest = min(classes, key=numbers.get), max(classes, key=numbers.get)
    counts = {split: len(samples) for split, samples in splits.items()}
    words = f'classes of {numbers[smallest]} ({smallest}) to {numbers[largest]} images ({largest})'
    if numbers[smallest] == numbers[largest]:
        words = f'classes of {numbers[smallest]} images each'
    return Written(config, data.report(f'images of {len(classes)} classes', sizes.values(), counts, words))


def _read(data: Folder, root: Path) -> Samples:
    """Read the images of a split with the names of their classes."""
    images, others = data.images(root)
    data.note_items('left out, not images', others)
    loose = [image for image in images if image.parent == root]
    if loose:
        raise ValueError(f'{loose[0]} must be in the folder of its class, {root}/CLASS/')
    return [(image, image.relative_to(root).parts[0]) for image in images]


def _classes(data: Folder, roots: dict[str, Path], splits: dict[str, Samples]) -> list[str]:
    root, least = roots['train'], 1 if 'val' in roots else 2
    names = [path.name for path in data.children(root)]
    counts = Counter(name for _, name in splits['train'])
    if len(names) < 2:
        raise ValueError(f'{root} must have at least two folders of images, one per class, but has {len(names)}')
    check_names(names, root)
    few = [name for name in names if counts[name] < least]
    if few:
        raise ValueError(f'{root / few[0]} must hold at least {least} readable images, but has {counts[few[0]]}')
    for split, samples in splits.items():
        unknown = sorted({name for _, name in samples} - set(names))
        if unknown:
            raise ValueError(f'{roots[split] / unknown[0]} is a class without a folder in {root}')
        if not samples:
            raise ValueError(f'{roots[split]} must hold readable images, but has none')
    return names


def _lines(root: Path, samples: Samples, classes: list[str]) -> list[str]:
    """Images and their labels, a line each; mmpretrain strips lines, so a path must not begin with a space."""
    labels = {name: label for label, name in enumerate(classes)}
    paths = [(image.relative_to(root).as_posix(), labels[name]) for image, name in samples]
    return [f'{"./" * (path != path.lstrip())}{path} {label}' for path, label in paths]
