"""Pictures of runs, drawn with matplotlib and written as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

try:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as error:
    raise ImportError(
        "pictures are drawn by matplotlib, which is not installed: pip install 'mmstrip[tools]'"
    ) from error

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


def plot_curves(panels: dict[str, dict[str, Curve]], x_label: str | Sequence[str], path: Path) -> None:
    """One panel a quantity, side by side.

    Args:
        panels: Title of each panel -> label of each curve in it -> its points.
        x_label: Shared label of the x axes, or one for each panel.
        path: PNG file to write.
    """
    figure = Figure(figsize=(5 * len(panels), 4), layout='constrained')
    labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
    for axes, (title, curves), x_label in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), labels
    ):
        for label, (x, y) in curves.items():
            axes.plot(x, y, label=label, marker='o' if len(x) < 40 else None, markersize=3)
        axes.set(title=title, xlabel=x_label)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


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


def plot_confusion(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Confusion matrix; of up to 30 classes the counts, of more the share of each true class, as colours.

    Args:
        labels, predictions: Class indices (N, ).
        classes: Name of each class.
        path: PNG file to write.
    """
    count = len(classes)
    few = count <= 30
    side = max(6, 0.45 * count) if few else 12
    matrix = np.zeros((count, count), dtype=int)
    np.add.at(matrix, (labels, predictions), 1)
    figure = Figure(figsize=(side, side), layout='constrained')
    axes = figure.subplots()
    picture = axes.imshow(matrix if few else matrix / matrix.sum(1, keepdims=True).clip(1), cmap='Blues')
    axes.set(xlabel='Predicted label', ylabel='True label', xticks=[], yticks=[])
    if count <= 120:  # more cannot be read
        size = None if few else 500 / count
        turned = 'vertical' if max(map(len, classes)) > 3 else 'horizontal'
        axes.set_xticks(range(count), classes, rotation=turned, fontsize=size, parse_math=False)
        axes.set_yticks(range(count), classes, fontsize=size, parse_math=False)
    if few:
        for (row, column), number in np.ndenumerate(matrix):
            color = 'white' if number > matrix.max() / 2 else 'black'
            axes.text(column, row, number, ha='center', va='center', color=color)
    else:
        figure.colorbar(picture, shrink=0.6, label='Share of the true class')
    axes.set_title(f'{np.mean(labels == predictions):.2%} of {len(labels)} right')
    figure.savefig(path, dpi=120)


def plot_predictions(samples: list[tuple[np.ndarray, str, str]], title: str, path: Path) -> None:
    """Sheet of images, each with its prediction; wrong ones in red, with the true class.

    Args:
        samples: Image (H, W, 3) in RGB from 0 to 255, predicted and true class of each.
        title: Title of the sheet.
        path: PNG file to write.
    """
    columns = 10
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(1.3 * columns, 1.65 * rows + 0.5), layout='constrained')
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis('off')
    for axes, (image, predicted, true) in zip(grid, samples):
        axes.imshow(image.astype(np.uint8))
        space = '\n' if len(predicted + true) > 12 else ' '
        right = predicted == true
        words = predicted if right else f'{predicted}{space}(is {true})'
        axes.set_title(words, fontsize=8, color='green' if right else 'red', parse_math=False)
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


def plot_fields(panels: dict[str, tuple[np.ndarray, tuple[float, float], Sequence[float]]], path: Path) -> None:
    """Receptive fields side by side, on one logarithmic scale from 1e-4 to 1 of each one's largest value.

    Args:
        panels: Title -> contributions (H, W); row and column of their centre; sides of the squares of half and of 99 %.
        path: PNG file to write.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns + 0.9, 3.5 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis('off')
    for axes, (title, (field, center, sides)) in zip(grid.ravel(), panels.items()):
        height, width = field.shape
        scaled = np.clip(field / field.max(), 1e-4, 1)
        picture = axes.imshow(scaled, cmap='magma', norm=LogNorm(1e-4, 1), extent=(0, width, height, 0))
        for side, style in zip(sides, ('-', '--')):
            corner = (center[1] - side / 2, center[0] - side / 2)
            axes.add_patch(Rectangle(corner, side, side, fill=False, color='cyan', linestyle=style))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_title(f'{title}\n50 %: {sides[0]:g} px, 99 %: {sides[1]:g} px', fontsize=10)
    figure.colorbar(picture, ax=grid, shrink=0.8, label='contribution, of the largest')
    figure.savefig(path, dpi=90)
