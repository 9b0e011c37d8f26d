"""Measure how many training images one CPU core loads per second, from the file to the sample that is batched: our
pipelines, the toolboxes' and torchvision v2's. CPU time of one thread, in rounds that run all pipelines in turn.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from mmstrip.utils.errors import short_errors

from ..machine import describe
from ..results import markdown_table, write_json

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'datasets'
OURS, THEIRS, TORCHVISION = 'mmstrip', 'toolbox', 'torchvision v2'
TASKS = {  # config, toolbox and size of the result
    'classification': ('imagenet_bs128_224', 'mmpretrain', '224 px'),
    'detection': ('coco_detection', 'mmdet', 'short side 480 to 800'),
    'segmentation': ('ade20k_512x512', 'mmseg', '512 px'),
}
_SHORT_SIDES = list(range(480, 801, 32))
_BOXES = np.float32([[0.1, 0.2, 0.5, 0.9], [0.4, 0.1, 0.6, 0.3], [0.6, 0.5, 0.95, 0.95]])  # of each image, relative
_MADE_SIZE, _MADE = (500, 375), 50


def pipelines(task: str) -> dict[str, Callable[[dict], object]]:
    """Owner -> pipeline, which turns an image with its annotations into a training sample."""
    config, toolbox, _ = TASKS[task]
    steps = [dict(step) for step in Config.fromfile(CONFIGS / f'{config}.py').train_pipeline]
    if toolbox == 'mmdet':
        scales = [(1333, side) for side in _SHORT_SIDES]
        steps[2] = dict(_scope_='mmdet', type='RandomChoiceResize', scales=scales, keep_ratio=True)
    theirs = [dict(step, type=step['type'].removeprefix('mmstrip.')) for step in steps]
    theirs = [step for step in theirs if step['type'] != 'ToPlanes']
    return {OURS: Compose(steps), THEIRS: Compose(theirs), TORCHVISION: _TORCHVISION[toolbox]}


def _decode(path: str) -> torch.Tensor:
    return tv_tensors.Image(decode_image(path, mode=ImageReadMode.RGB))


_CLASSIFY = v2.Compose(
    [
        v2.RandomResizedCrop(224, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR),  # for tensors, there is no bicubic
        v2.RandomErasing(0.25, value=0),
    ]
)
_DETECT = v2.Compose([v2.RandomShortestSize(_SHORT_SIDES, max_size=1333), v2.RandomHorizontalFlip()])
_SEGMENT = v2.Compose(
    [
        v2.ScaleJitter((512, 2048), (0.5, 2.0)),
        v2.RandomCrop(512, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),
        v2.RandomHorizontalFlip(),
        v2.RandomPhotometricDistort(),
    ]
)


def _detect(sample: dict) -> object:
    image = _decode(sample['img_path'])
    boxes = torch.tensor([instance['bbox'] for instance in sample['instances']])
    return _DETECT(image, tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=image.shape[-2:]))


_TORCHVISION = dict(
    mmpretrain=lambda sample: _CLASSIFY(_decode(sample['img_path'])),
    mmdet=_detect,
    mmseg=lambda sample: _SEGMENT(
        _decode(sample['img_path']), tv_tensors.Mask(decode_image(sample['seg_map_path'], mode=ImageReadMode.GRAY))
    ),
)


def find_images(folder: Path, number: int) -> list[Path]:
    """Random JPEG files of a folder and its subfolders, the same ones each time.

    Raises:
        FileNotFoundError: There are none.
    """
    found = sorted(path for path in folder.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))
    if not found:
        raise FileNotFoundError(f'no *.jpg or *.jpeg files in {folder} or its subfolders; name a folder of photographs')
    return random.Random(0).sample(found, min(number, len(found)))


def make_images(folder: Path) -> list[Path]:
    """Images of smooth shapes and noise in ImageNet's usual size, a substitute for photographs."""
    generator = np.random.default_rng(0)
    for i in range(_MADE):
        layers = (generator.normal(0, 40, (side, side, 3)) for side in (4, 16, 64))
        image = 128 + sum(cv2.resize(layer, _MADE_SIZE, interpolation=cv2.INTER_CUBIC) for layer in layers)
        image = (image + generator.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f'{i}.jpg'), image)
    return sorted(folder.glob('*.jpg'))


def annotate(image: Path, folder: Path) -> dict:
    """A sample with the annotations of all tasks; its label map is written to ``folder``."""
    height, width = cv2.imread(str(image)).shape[:2]
    labels = cv2.resize(
        np.random.default_rng(0).integers(0, 150, (6, 8), dtype=np.uint8), (width, height), None, 0, 0, 0
    )
    label_map = folder / f'{width}x{height}.png'
    if not label_map.exists():
        cv2.imwrite(str(label_map), labels)
    boxes = (_BOXES * [width, height, width, height]).tolist()
    instances = [dict(bbox=box, bbox_label=0, ignore_flag=0) for box in boxes]
    return dict(
        img_path=str(image),
        img_id=0,
        gt_label=0,
        instances=instances,
        seg_map_path=str(label_map),
        seg_fields=[],
        reduce_zero_label=False,
    )


def measure(task: str, samples: list[dict], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds per image in each round but the first; all pipelines get the same random numbers."""
    candidates = pipelines(task)
    milliseconds = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        spent = dict.fromkeys(candidates, 0.0)
        for i, sample in enumerate(samples):
            for name, pipeline in candidates.items():
                for seed in (random.seed, np.random.seed, torch.manual_seed):
                    seed(i)
                begin = time.process_time()
                pipeline(dict(sample))
                spent[name] += time.process_time() - begin
        for name, seconds in spent.items():
            milliseconds[name].append(seconds / len(samples) * 1e3)
    return {name: values[1:] for name, values in milliseconds.items()}


def table(results: dict[str, dict[str, list[float]]]) -> str:
    head = ('training pipeline', 'owner', 'ms per image (quartiles)', 'images/s per core', 'mmstrip is as fast as')
    rows = []
    for task, milliseconds in results.items():
        _, toolbox, size = TASKS[task]
        for name, values in milliseconds.items():
            first, _, third = quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
            ratio = median(other / own for own, other in zip(milliseconds[OURS], values))
            whose = toolbox if name == THEIRS else name
            times = f'{median(values):.2f} ({first:.2f}-{third:.2f})'
            compared = '' if name == OURS else f'{ratio:.2f}x'
            rows.append((f'{task}, {size}', whose, times, f'{1e3 / median(values):.0f}', compared))
    return markdown_table(head, rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='?', type=Path, help='folder of JPEG photographs (default: generated images)')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS))
    parser.add_argument('--number', type=int, default=200, help='images per round (default: 200)')
    parser.add_argument('--rounds', type=int, default=7, help='(default: 7)')
    parser.add_argument('--out', type=Path, metavar='FILE', help='save all results as JSON')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with short_errors(), tempfile.TemporaryDirectory() as folder:
        images = find_images(args.images, args.number) if args.images else make_images(Path(folder))
        samples = [annotate(image, Path(folder)) for image in images]
        results = {task: measure(task, samples, args.rounds) for task in args.tasks}
    print(f'{len(samples)} images, {args.rounds} rounds\n\n{table(results)}')
    if args.out:
        write_json(args.out, dict(machine=describe('cpu'), images=str(args.images), milliseconds=results))
        print(f'\nSaved in {args.out}')


if __name__ == '__main__':
    main()
