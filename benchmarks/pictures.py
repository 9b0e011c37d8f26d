"""Pictures of results, drawn with matplotlib and written as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_bars(panels: dict[str, dict[str, Sequence[float]]], y_label: str, path: Path) -> None:
    """Means with error bars of one standard deviation, and the single values.

    Args:
        panels: Title of each panel -> label of each place on its x axis -> the values there.
        y_label: Shared label of the y axes.
        path: PNG file to write.
    """
    figure = Figure(figsize=(1.5 + 0.9 * sum(len(places) for places in panels.values()), 4), layout='constrained')
    widths = [len(places) for places in panels.values()]
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axes, (title, places) in zip(grid, panels.items()):
        for x, values in enumerate(places.values()):
            axes.errorbar(x, np.mean(values), np.std(values, ddof=min(1, len(values) - 1)), marker='o', capsize=5)
            axes.plot([x] * len(values), values, linestyle='', marker='.', color='grey', alpha=0.6)
        axes.set(title=title.replace(' ', '\n', 1), xlim=(-0.5, len(places) - 0.5))  # panels may be narrow
        axes.set_xticks(range(len(places)), list(places))
        axes.grid(alpha=0.3, axis='y')
    grid[0].set_ylabel(y_label)
    figure.savefig(path, dpi=120)


def plot_pictures(rows: dict[str, list[np.ndarray]], path: Path) -> None:
    """Rows of pictures.

    Args:
        rows: Title of each row -> its pictures, each (H, W, 3) in RGB from 0 to 255.
        path: PNG file to write.
    """
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(5 * columns, 2.7 * len(rows)), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis('off')
    for line, (title, pictures) in zip(grid, rows.items()):
        line[0].set_title(title, loc='left', fontsize=11)
        for axes, picture in zip(line, pictures):
            axes.imshow(picture)
    figure.savefig(path, dpi=80)
