"""Tables and plots of a benchmark."""

import json
from pathlib import Path
from statistics import median

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

HEADS = (
    'ms',
    'quartiles',
    'images/s',
    'speed',
    'peak MiB',
    'params M',
    'FLOPs G',
    'GFLOP/s',
    'of ceiling',
    'difference',
)


def print_report(report: dict) -> None:
    """Print a table for each mode and shape; "speed" is relative to the first model.

    "difference" is the largest error of the outputs relative to the largest output of the modules in float32.
    """
    environment, settings = report['environment'], report['settings']
    ceilings = ', '.join(f'{value:,.0f} GFLOP/s in {dtype}' for dtype, value in report['ceiling_gflops'].items())
    console = Console(width=160)
    console.print(
        f'{environment["device"]}, {environment["threads"]} threads, torch {environment["torch"]}, '
        f'{environment["operators"]}; batch {settings["batch"]}, '
        f'{settings["dtype"]}, {settings["rounds"]} rounds; a large matrix product: {ceilings}',
        highlight=False,
    )
    for (mode, shape), results in _by_case(report).items():
        table = Table(title=f'{mode}, {shape[0]}x{shape[1]}')
        table.add_column('model')
        for head in HEADS:
            table.add_column(head, justify='right')
        for result in results:
            table.add_row(*_cells(result, results[0]))
        console.print(table)


def _cells(result: dict, first: dict) -> tuple[str, ...]:
    return (
        result['label'],
        f'{1e3 * result["median"]:.1f}',
        f'{1e3 * result["q1"]:.1f}-{1e3 * result["q3"]:.1f}',
        f'{result["images_per_second"]:.1f}',
        f'{paired_ratio(first, result):.2f}x',
        '' if result['peak_mib'] is None else f'{result["peak_mib"]:.0f}',
        f'{result["params"] / 1e6:.1f}',
        f'{result["flops"] / 1e9:.2f}',
        f'{result["gflops"]:,.0f}',
        f'{result["of_ceiling"]:.0%}',
        '' if result['difference'] is None else f'{result["difference"]:.0e}',
    )


def paired_ratio(first: dict, other: dict) -> float:
    """How many times as fast as ``first`` the other is: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(first['seconds'], other['seconds']))


def _by_case(report: dict) -> dict[tuple, list[dict]]:
    cases = {}
    for result in report['results']:
        cases.setdefault((result['mode'], tuple(result['shape'])), []).append(result)
    return cases


def save_report(report: dict, folder: Path) -> None:
    """Write ``benchmark.json``, and ``benchmark_{mode}.png``: throughput against FLOPs, time against resolution."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'benchmark.json').write_text(json.dumps(report, indent=1))
    for mode in report['settings']['modes']:
        results = [result for result in report['results'] if result['mode'] == mode]
        plot_benchmark(results, f'{mode}, {report["environment"]["device"]}', folder / f'benchmark_{mode}.png')


def plot_benchmark(results: list[dict], title: str, path: Path) -> None:
    """Throughput against FLOPs at the first shape, and time per megapixel against resolution if there are several.

    Squares have lower precision than float32.

    Args:
        results: Of one mode, see :func:`.rounds.run_benchmark`.
        title: Title of the plot.
        path: PNG file to write.
    """
    shapes = sorted({tuple(result['shape']) for result in results}, key=lambda shape: shape[0] * shape[1])
    labels = list(dict.fromkeys(result['label'] for result in results))
    height = max(4.5, 0.5 + 0.18 * len(labels))  # that of the legend
    figure = Figure(figsize=(8.5 + 6 * (len(shapes) > 1), height), layout='constrained')
    figure.suptitle(title)
    first, *others = figure.subplots(1, 1 + (len(shapes) > 1), squeeze=False)[0]
    colors = colormaps['tab20']
    for number, label in enumerate(labels):
        own = sorted((r for r in results if r['label'] == label), key=lambda r: r['shape'][0] * r['shape'][1])
        style = dict(color=colors(number % colors.N), marker='o' if own[0]['dtype'] == 'float32' else 's')
        batch = own[0]['images_per_second'] * own[0]['median']
        rates = [batch / own[0][quartile] for quartile in ('q3', 'median', 'q1')]
        spread = [[rates[1] - rates[0]], [rates[2] - rates[1]]]
        first.errorbar(own[0]['flops'] / 1e9, rates[1], yerr=spread, linestyle='', label=label, capsize=3, **style)
        for axes in others:
            pixels = [r['shape'][0] * r['shape'][1] / 1e6 for r in own]
            times = [1e3 * r['median'] / batch / area for r, area in zip(own, pixels)]
            axes.plot(pixels, times, **style)
    first.set(xlabel='multiply-adds per image, G', ylabel='images/s', title='{}x{}'.format(*shapes[0]), ylim=(0, None))
    for axes in others:
        axes.set(xlabel='megapixels', ylabel='ms per megapixel', title='any resolution', ylim=(0, None))
    for axes in (first, *others):
        axes.grid(alpha=0.3)
    figure.legend(loc='outside right upper', fontsize=8)
    figure.savefig(path, dpi=120)
