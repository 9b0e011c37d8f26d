"""Compare transfer learning with training from scratch: train the digits classifier, then a detector and a segmentor of
digit scenes, from the classifier and from scratch, with the same budget and seed. Write a table, curves, pictures."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mmcv
from mmengine.config import Config
from mmengine.logging import print_log
from rich.console import Console
from rich.table import Table

from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.utils.config import add_config_options, load_config
from mmstrip.utils.plots import plot_curves

from . import CONFIGS
from .evidence.run import train_and_test
from .pictures import plot_pictures
from .results import as_json, write_json

CLASSIFIER = CONFIGS / 'strip_mlp' / 'strip-mlp-nano_1xb64_digits-64px.py'


class Task(NamedTuple):
    """A task that the classifier's weights are transferred to.

    Attributes:
        config: Its config file.
        metrics: Name of each metric in the table -> its name in the log and the value there that means 1.
    """

    config: Path
    metrics: dict[str, tuple[str, float]]


# The first metric of each task is plotted.
TASKS = {
    'detection': Task(
        CONFIGS / 'detection' / 'mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py',
        {
            'box AP50': ('coco/bbox_mAP_50', 1),
            'box AP': ('coco/bbox_mAP', 1),
            'mask AP50': ('coco/segm_mAP_50', 1),
            'mask AP': ('coco/segm_mAP', 1),
        },
    ),
    'segmentation': Task(
        CONFIGS / 'segmentation' / 'strip-mlp-nano_fpn_1xb8_digit-scenes.py',
        {'mIoU': ('mIoU', 100)},
    ),
}
STARTS = ('classifier', 'scratch')


class Backbone(NamedTuple):
    """A backbone to compare.

    Attributes:
        config: Its config without ``out_indices``; None: the one in the config files.
        channels: Channels of its stages.
    """

    config: dict | None
    channels: tuple[int, ...]


BACKBONES = {
    'strip-mlp-nano': Backbone(None, (48, 96, 192, 384)),
    'resnet18': Backbone(dict(type='mmpretrain.ResNet', depth=18), (64, 128, 256, 512)),
    'swin-tiny': Backbone(
        dict(type='mmpretrain.SwinTransformer', arch='tiny', img_size=64, pad_small_map=True), (96, 192, 384, 768)
    ),
}


def compare_transfer(
    work_dir: str,
    data_root: str,
    backbones: Sequence[str],
    tasks: Sequence[str],
    starts: Sequence[str],
    options: dict | None = None,
) -> list[dict]:
    """Train the digits classifier, then each task on scenes of digits from each start, and compare the results.

    All runs of a task have the same budget and seed. In ``work_dir``, ``{backbone}/{run}/`` holds the logs and
    checkpoints of each run, its ``result.json`` and ``pictures/``; ``curves.png``, ``predictions.png`` and
    ``results.json`` compare the runs. Finished runs are skipped; interrupted runs resume from their last checkpoint.

    Args:
        work_dir: Folder for all results.
        data_root: Folder of the scenes, generated if missing.
        backbones: Names from ``BACKBONES``.
        tasks: Names from ``TASKS``.
        starts: 'classifier', 'scratch' or both.
        options: Dotted keys and values that override all configs.

    Returns:
        One dict per run of a task: 'backbone', 'task', 'start', 'seconds' (of training, without validation), the
        metrics of the task (0 to 1), and 'curve', the epochs and values of its first metric.

    Raises:
        ValueError: ``work_dir`` holds runs with other settings.
    """
    work_dir = Path(work_dir)
    if not (Path(data_root) / 'annotations' / 'val.json').is_file():
        write_digit_scenes(data_root)
    results = []
    runs = [(backbone, task, start) for backbone in backbones for task in tasks for start in starts]
    for number, (backbone, task, start) in enumerate(runs, 1):
        folder = work_dir / backbone
        checkpoint = _train_classifier(backbone, folder / 'classifier', options) if start == 'classifier' else None
        print_log(f'Run {number} of {len(runs)}: {backbone}, {task} from {start}', logger='current')
        config = task_config(backbone, task, str(data_root), checkpoint, options)
        settings = as_json(dict(data_root=str(data_root), options=options))
        metrics = _run(config, folder / f'{task}-from-{start}', TASKS[task].metrics, settings)
        results.append(dict(backbone=backbone, task=task, start=start, **metrics))
    write_json(work_dir / 'results.json', results)
    _draw(results, work_dir)
    _print_table(results, work_dir)
    return results


def _train_classifier(backbone: str, folder: Path, options: dict | None) -> str:
    """Path of the checkpoint of the digits classifier, trained if missing."""
    config = load_config(str(CLASSIFIER), options)
    use_backbone(config, backbone)
    _run(config, folder, {'top-1': ('accuracy/top1', 100)}, dict(options=options))
    return (folder / 'last_checkpoint').read_text()


def task_config(
    backbone: str, task: str, data_root: str, checkpoint: str | None = None, options: dict | None = None
) -> Config:
    """The config of a run.

    Args:
        backbone: Name from ``BACKBONES``.
        task: Name from ``TASKS``.
        data_root: Folder of the scenes.
        checkpoint: Classifier to start from; None: from scratch.
        options: Dotted keys and values that override the config.
    """
    config = load_config(str(TASKS[task].config), options)
    use_backbone(config, backbone)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = data_root
    for evaluator in (config.val_evaluator, config.test_evaluator):
        if 'ann_file' in evaluator:
            evaluator.ann_file = str(Path(data_root) / 'annotations' / 'val.json')
    if checkpoint:
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
    return config


def use_backbone(config: Config, name: str) -> None:
    """Replace the backbone of a config, and the channels of its neck or head."""
    backbone, channels = BACKBONES[name]
    if backbone is None:
        return
    model = config.model
    out_indices = model.backbone.get('out_indices', (3,))
    model.backbone = dict(backbone, out_indices=out_indices)
    if 'in_channels' in model.neck:
        model.neck.in_channels = [channels[i] for i in out_indices]
    else:
        model.head.in_channels = channels[-1]


def _run(config: Config, folder: Path, metrics: dict[str, tuple[str, float]], settings: dict) -> dict:
    """Train and test in ``folder``, or read the result of an earlier run."""
    result_file = folder / 'result.json'
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        if result['settings'] != settings:
            raise ValueError(
                f'{folder} holds a run with other settings, {result["settings"]} instead of {settings}; choose another '
                '--work-dir'
            )
        print_log(f'Skipping the finished run in {folder}', logger='current')
        return result
    found = train_and_test(config, folder, metrics)
    result = {name: found[name] for name in metrics}
    result |= dict(seconds=round(60 * found['minutes']), epochs=found['epochs'], settings=settings)
    first = next(iter(metrics))
    result['curve'] = [[point[name] for point in found['curve']] for name in ('epoch', first)]
    write_json(result_file, result)
    return result


def _draw(results: list[dict], work_dir: Path) -> None:
    panels, pictures = {}, {}
    for result in results:
        name = f'{result["backbone"]} from {result["start"]}'
        metric = next(iter(TASKS[result['task']].metrics))
        panels.setdefault(f'{result["task"]}: {metric}', {})[name] = result['curve']
        files = sorted((work_dir / result['backbone'] / f'{result["task"]}-from-{result["start"]}').glob('pictures/*'))
        pictures[f'{result["task"]}\n{name}'] = [mmcv.imread(file, channel_order='rgb') for file in files[:4]]
    plot_curves(panels, 'epoch', work_dir / 'curves.png')
    plot_pictures(pictures, work_dir / 'predictions.png')


def _print_table(results: list[dict], work_dir: Path) -> None:
    table = Table(title='Transfer from the digits classifier to scenes of digits')
    metrics = [name for task in TASKS.values() for name in task.metrics]
    for column in ('backbone', 'task', 'start', *metrics, 'minutes'):
        table.add_column(column)
    for result in results:
        values = [f'{result[name]:.3f}' if name in result else '' for name in metrics]
        minutes = f'{result["seconds"] / 60:.1f}'
        table.add_row(result['backbone'], result['task'], result['start'], *values, minutes)
    console = Console(width=max(Console().width, 110))  # the whole table, even in a pipe
    console.print(table)
    for name in ('curves.png', 'predictions.png', 'results.json'):
        console.print(f'{work_dir / name}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/transfer', help='folder for results (default: %(default)s)')
    parser.add_argument(
        '--data', default='data/digit_scenes', help='folder of the scenes, generated if missing (default: %(default)s)'
    )
    parser.add_argument(
        '--backbones',
        nargs='+',
        choices=BACKBONES,
        default=['strip-mlp-nano'],
        metavar='NAME',
        help=f'one or more of {", ".join(BACKBONES)} (default: the first)',
    )
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS), help='default: all')
    parser.add_argument('--starts', nargs='+', choices=STARTS, default=list(STARTS), help='default: both')
    add_config_options(parser, 'all configs')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    compare_transfer(args.work_dir, args.data, args.backbones, args.tasks, args.starts, args.cfg_options)


if __name__ == '__main__':
    main()
