"""docs/results.md: tables and plots from the JSON files of the runs."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import mmcv
import numpy as np

from mmstrip.utils.plots import plot_curves

from ..pictures import plot_differences
from ..results import markdown_table, write_text
from .experiments import (
    ABLATIONS_LARGE_SEEDS,
    ABLATIONS_SEEDS,
    CALTECH101,
    CAMVID_RECIPES,
    DIGIT_SCENES_TRIALS,
    SEEDS,
    TRANSFER,
    transfer_name,
)
from .paired import count_needed, half_width, interval, paired_differences
from .run import Results, read_results

MISSING, UNMEASURED = 'not yet run', 'not yet measured'
_SHEET_WIDTH = 1400  # pixels, of sheets of predictions
# Variant -> name in the table, the paper's claim about the shared network over it (None: not better), and the paper's
# difference on Caltech-101 and CIFAR-100 at 224 px, 300 epochs.
ABLATIONS = {
    'channel-patches-1': ('channel patches: 1', 'C/4 channel patches are better than one', '+1.16, +1.47'),
    'branches-lsmm': ('branches: LSMM alone', 'both branches are better than LSMM alone', 'clearly better'),
    'branches-cgsmm': ('branches: CGSMM alone', 'both branches are better than CGSMM alone', 'clearly better'),
    'rows-and-columns-parallel': (
        'rows and columns: parallel',
        'rows and columns in cascade are better than in parallel',
        '+0.48, +0.61',
    ),
    'strip-width-1': ('strip width: 1', 'strips of width 3 are better than of width 1', 'better'),
    'strip-width-7': ('strip width: 7', None, 'saturated'),
}
PILOT = 'channel-patches-1', ABLATIONS_SEEDS[:3]
# Pictures below a table, if they exist.
PICTURES = {
    'caltech101': (
        ('results_caltech101.png', 'Validation accuracy over epochs and minutes, seed 0'),
        ('results_caltech101_confusion_matrix.png', 'Confusion matrix of the T* classifier'),
    ),
    'ablations': (('results_ablations.png', 'Paired differences and their 95 % intervals'),),
    'transfer': (
        ('results_transfer.png', 'Validation metrics over the epochs'),
        ('results_bccd.jpg', 'BCCD: ground truth (left) and the detector from the T* classifier (right)'),
        ('results_camvid.jpg', 'CamVid: ground truth (left) and the segmentor from the T* classifier (right)'),
    ),
}


def write_page(results_dir: Path, page: Path, work_dir: Path) -> list[Path]:
    """Fill in the tables of a page and draw its plots.

    The table NAME and its pictures, from ``images/`` beside the page, go between ``<!-- results: NAME -->`` and
    ``<!-- end -->``. Missing runs are marked.

    Args:
        results_dir: Folder of the results, ``{part}/{name}.json``.
        page: Markdown file with these marks.
        work_dir: Folder of the runs, ``{part}/{name}/``, for pictures of predictions, if it has them.

    Returns:
        The files that were written.

    Raises:
        ValueError: The page has a mark for an unknown table.
    """
    results = read_results(results_dir)
    images = page.parent / 'images'
    images.mkdir(exist_ok=True)
    plots = (_plot_caltech101, _plot_ablations, _plot_transfer)
    drawn = [plot(results, images) for plot in plots]
    drawn.append(_copy_confusion_matrix(work_dir, images))
    drawn += [_draw_predictions(task, work_dir, images) for task in TRANSFER]

    def fill(match: re.Match) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f'{page}: the mark "results: {name}" must name one of {", ".join(TABLES)}')
        shown = [f'![{title}](images/{file})' for file, title in PICTURES.get(name, ()) if (images / file).is_file()]
        content = '\n\n'.join([TABLES[name](results), *shown])
        return f'<!-- results: {name} -->\n{content}\n<!-- end -->'

    text = re.sub(r'<!-- results: (\S+) -->.*?<!-- end -->', fill, page.read_text(), flags=re.S)
    write_text(page, text)
    return [page, *filter(None, drawn)]


def _seeds(results: Results, prefix: str, seeds: Sequence[int] = SEEDS) -> list[dict]:
    """Results of one setting for several seeds."""
    return [results[key] for seed in seeds if (key := f'{prefix}_seed{seed}') in results]


def _mean(runs: list[dict]) -> str:
    """Mean top-1 and, for several runs, standard deviation, in percent."""
    values = [100 * run['top-1'] for run in runs]
    if not values:
        return MISSING
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def _caltech101_table(results: Results) -> str:
    head = ('model', 'test top-1, %', 'seeds', 'validation', 'lr', 'params', 'FLOPs', 'minutes', 'images/s')
    rows = []
    for model in CALTECH101:
        runs = _seeds(results, f'caltech101/{model}')
        if not runs:
            rows.append([model, MISSING, *[''] * (len(head) - 2)])
            continue
        first = runs[0]
        speed = _speed(results, model)
        rows.append(
            [
                model,
                _mean(runs),
                len(runs),
                f'{100 * mean(run["curve"][-1]["top-1"] for run in runs):.2f}',
                f'{first["settings"]["options"]["optim_wrapper.optimizer.lr"]:g}',
                f'{first["params"] / 1e6:.2f} M',
                f'{first["flops"] / 1e9:.2f} G',
                f'{_epoch_minutes(first, speed) * first["epochs"]:.1f}' if speed else UNMEASURED,
                f'{speed:.1f}' if speed else UNMEASURED,
            ]
        )
    return markdown_table(head, rows)


def _speed(results: Results, model: str) -> float | None:
    """Training images per second on one core, measured for all models in turns on one machine."""
    measured = results.get('speed/benchmark', {}).get('results', [])
    found = [one['images_per_second'] for one in measured if one['label'].partition(' @')[0] == model]
    return found[0] if found else None


def _epoch_minutes(run: dict, speed: float) -> float:
    """Minutes per epoch at the speed measured on one machine, as runs may have used several."""
    return run['images'] / run['epochs'] / speed / 60


def _fashion_mnist_table(results: Results) -> str:
    rows = []
    for key in sorted(key for key in results if key.startswith('fashion-mnist/') and 'choose' not in key):
        run = results[key]
        config = Path(run['settings']['config']).stem
        size = f'{run["params"] / 1e6:.2f} M'
        cost = [run['epochs'], f'{run["core_minutes"]:.0f}', run['machine']['cpu']]
        rows.append([config, f'{100 * run["top-1"]:.2f}', size, *cost])
    head = ('config', 'test top-1, %', 'params', 'epochs', 'core minutes', 'CPU')
    return markdown_table(head, rows) if rows else MISSING


def _ablations_table(results: Results) -> str:
    shared = _by_seed(results, 'shared')
    rows = [['full network', *_ablation_row(results, 'shared'), '', '']]
    claims = []
    for variant, (title, claim, paper) in ABLATIONS.items():
        differences = paired_differences(shared, _by_seed(results, variant))
        ours = '{:+.2f} ± {:.2f}'.format(*interval(differences)) if len(differences) > 2 else ''
        rows.append([title, *_ablation_row(results, variant), ours, paper])
        if claim and len(differences) == len(ABLATIONS_SEEDS):
            claims.append(f'- {claim[0].upper()}{claim[1:]}: {_verdict(*interval(differences))}.')
    head = ('network', 'test top-1, %', 'seeds', 'params', 'gain of the full network, 95 %', 'in the paper')
    return '\n\n'.join(filter(None, [markdown_table(head, rows), _pilot(results), '\n'.join(claims)]))


def _ablations_large_table(results: Results) -> str:
    rows = []
    for side, part, seeds in (64, 'ablations', ABLATIONS_SEEDS), (128, 'ablations-128px', ABLATIONS_LARGE_SEEDS):
        accuracy = [_mean(_seeds(results, f'{part}/{variant}', seeds)) for variant in ('shared', PILOT[0])]
        differences = paired_differences(*(_by_seed(results, variant, part) for variant in ('shared', PILOT[0])))
        rows.append([f'{side} px', *accuracy, ', '.join(f'{one:+.2f}' for one in differences)])
    head = ('resolution', 'full network, test top-1, %', ABLATIONS[PILOT[0]][0], 'gain of the full network, by seed')
    return markdown_table(head, rows)


def _by_seed(results: Results, variant: str, part: str = 'ablations') -> dict[int, float]:
    """Seed -> top-1 in %."""
    keys = {seed: f'{part}/{variant}_seed{seed}' for seed in ABLATIONS_SEEDS}
    return {seed: 100 * results[key]['top-1'] for seed, key in keys.items() if key in results}


def _ablation_row(results: Results, variant: str) -> list:
    runs = _seeds(results, f'ablations/{variant}', ABLATIONS_SEEDS)
    return [_mean(runs), len(runs) or '', f'{runs[0]["params"] / 1e6:.2f} M' if runs else '']


def _verdict(gain: float, error: float) -> str:
    """Verdict on the claim that a difference is above 0, from its 95 % interval."""
    return 'confirmed' if gain > error else 'contradicted' if gain < -error else 'not decided at this budget'


def _pilot(results: Results) -> str:
    """Standard deviation of the pilot, and the number of seeds that follows from it."""
    variant, seeds = PILOT
    shared, other = (_by_seed(results, name) for name in ('shared', variant))
    if not all(seed in shared and seed in other for seed in seeds):
        return ''
    deviation = stdev(paired_differences({seed: shared[seed] for seed in seeds}, other))
    few, all_seeds = len(seeds), len(ABLATIONS_SEEDS)
    needed = ', '.join(
        f'{count_needed(deviation, points) or "more than 16"} for {points}' for points in (1.0, 0.7, 0.5)
    )
    return (
        f'Pilot: the differences of {few} seeds have a standard deviation of {deviation:.2f} points. This gives an '
        f'interval of ± {half_width(deviation, few):.2f} with {few} seeds and ± {half_width(deviation, all_seeds):.2f} '
        f'with {all_seeds}. Seeds needed, by half-width of the interval in points: {needed}.'
    )


def _transfer_table(results: Results) -> str:
    rows = []
    for name, task in TRANSFER.items():
        first = next(iter(task.metrics))
        for model in task.models:
            for start in ('classifier', 'scratch'):
                run = results.get(f'transfer/{transfer_name(name, model, start)}')
                values = [f'{run[metric]:.3f}' for metric in task.metrics] if run else [MISSING]
                padded = [
                    ', '.join(f'{found[first]:.3f}' for found in (run or {}).get(kind, {}).values())
                    for kind in ('padding', 'padding_ignored')
                ]
                rows.append([name, model, start, f'{", ".join(task.metrics)} {", ".join(values)}', *padded])
    head = 'dataset', 'backbone', 'from', 'test', 'validation, padded to 1, 32, 128', 'with ignore_padding: 32, 128'
    return markdown_table(head, rows)


def _camvid_recipes_table(results: Results) -> str:
    model = next(iter(TRANSFER['camvid'].models))
    rows = []
    for recipe in CAMVID_RECIPES:
        run = results.get(f'camvid-recipes/{recipe}_{model}')
        rows.append(
            [recipe.replace('-crops-', ', crops of ').replace('-', ' '), f'{run["mIoU"]:.3f}' if run else MISSING]
        )
    return markdown_table(('recipe', 'mIoU, validation'), rows)


def _cifar10_table(results: Results) -> str:
    rows = []
    for start in ('classifier', 'scratch'):
        run = results.get(f'cifar10/from-{start}')
        curve = ', '.join(f'{100 * point["top-1"]:.2f}' for point in run['curve']) if run else ''
        rows.append([start, _mean([run] if run else []), curve])
    return markdown_table(('from', 'test top-1, %', 'validation, by epoch'), rows)


def _digit_scenes_table(results: Results) -> str:
    rows = []
    for name in DIGIT_SCENES_TRIALS:
        run = results.get(f'digit-scenes/{name}')
        rows.append([name.replace('-', ' '), f'{run["mIoU"]:.3f}' if run else MISSING])
    return markdown_table(('change', 'mIoU'), rows)


TABLES: dict[str, Callable[[Results], str]] = {
    'caltech101': _caltech101_table,
    'fashion-mnist': _fashion_mnist_table,
    'ablations': _ablations_table,
    'ablations-128px': _ablations_large_table,
    'transfer': _transfer_table,
    'camvid-recipes': _camvid_recipes_table,
    'cifar10': _cifar10_table,
    'digit-scenes': _digit_scenes_table,
}


def _plot_caltech101(results: Results, images: Path) -> Path | None:
    by_epoch, by_minute = {}, {}
    for model in CALTECH101:
        runs = _seeds(results, f'caltech101/{model}')
        if runs:
            curve = runs[0]['curve']
            accuracy = [100 * point['top-1'] for point in curve]
            by_epoch[model] = [point['epoch'] for point in curve], accuracy
            if speed := _speed(results, model):
                minutes = _epoch_minutes(runs[0], speed)
                by_minute[model] = [point['epoch'] * minutes for point in curve], accuracy
    if not by_epoch:
        return None
    path = images / 'results_caltech101.png'
    panels = {'Validation top-1 in %, by epoch': by_epoch}
    if by_minute:
        panels['Validation top-1 in %, by time'] = by_minute
    plot_curves(panels, ('epoch', 'minutes of one core'), path)
    return path


def _plot_ablations(results: Results, images: Path) -> Path | None:
    shared = _by_seed(results, 'shared')
    differences = {title: paired_differences(shared, _by_seed(results, key)) for key, (title, *_) in ABLATIONS.items()}
    rows = {title: (found, *interval(found)) for title, found in differences.items() if len(found) > 2}
    if not rows:
        return None
    path = images / 'results_ablations.png'
    plot_differences(rows, 'top-1 of the full network minus that of the variant, points', path)
    return path


def _plot_transfer(results: Results, images: Path) -> Path | None:
    panels = {}
    for name, task in TRANSFER.items():
        metric = next(iter(task.metrics))
        for model in task.models:
            for start in ('classifier', 'scratch'):
                run = results.get(f'transfer/{transfer_name(name, model, start)}')
                if run:
                    points = run['curve']
                    curve = [point['epoch'] for point in points], [point[metric] for point in points]
                    panels.setdefault(f'{name}, validation {metric}', {})[f'{model} from {start}'] = curve
    if not panels:
        return None
    path = images / 'results_transfer.png'
    plot_curves(panels, 'epoch', path)
    return path


def _copy_confusion_matrix(work_dir: Path, images: Path) -> Path | None:
    """Confusion matrix of the first model of part 1."""
    found = sorted((work_dir / 'caltech101' / f'{next(iter(CALTECH101))}_seed0').glob('*/confusion_matrix.png'))
    if not found:
        return None
    path = images / 'results_caltech101_confusion_matrix.png'
    shutil.copyfile(found[-1], path)
    return path


def _draw_predictions(task: str, work_dir: Path, images: Path) -> Path | None:
    """Truth and prediction on six test images, two per row, of the first backbone from its classifier."""
    folder = work_dir / 'transfer' / transfer_name(task, next(iter(TRANSFER[task].models)), 'classifier') / 'pictures'
    files = sorted(folder.glob('*.png'))
    if not files:
        return None
    pictures = [mmcv.imread(file) for file in files[:: max(len(files) // 6, 1)][:6]]  # from all sequences of CamVid
    height, width = pictures[0].shape[:2]
    cells = np.full((-(-len(pictures) // 2), 2, height, width, 3), 255, np.uint8)
    for cell, picture in zip(cells.reshape(-1, height, width, 3), pictures):
        cell[:] = mmcv.imresize(picture, (width, height))
    sheet = cells.swapaxes(1, 2).reshape(-1, 2 * width, 3)
    path = images / f'results_{task}.jpg'
    mmcv.imwrite(mmcv.imrescale(sheet, _SHEET_WIDTH / sheet.shape[1]), str(path))
    return path
