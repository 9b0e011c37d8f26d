"""Pictures of results, drawn with matplotlib and written as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_differences(rows: dict[str, tuple[Sequence[float], float, float]], x_label: str, path: Path) -> None:
    """Means with their intervals, one below the other, and the single values.

    Args:
        rows: Label of each row -> its values, their mean, and half the width of the interval.
        x_label: Label of the x axis.
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout='constrained')
    axes = figure.subplots()
    for y, (values, center, half_width) in enumerate(rows.values()):
        axes.errorbar(center, y, xerr=half_width, marker='o', capsize=5, color='C0')
        axes.plot(values, [y] * len(values), linestyle='', marker='.', color='grey', alpha=0.6)
    axes.axvline(0, color='black', linewidth=1)
    axes.set(xlabel=x_label, ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.grid(alpha=0.3, axis='x')
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
