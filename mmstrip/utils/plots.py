"""Plots of runs, drawn with matplotlib and written as PNG files."""

import contextlib
import functools
import logging
import string
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from mmengine.logging import print_log

try:
    from matplotlib import font_manager, rc_context, rcParams
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as error:
    raise ImportError("plots need matplotlib, which is not installed: pip install 'mmstrip[tools]'") from error

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


def drawable(name: str, length: int = 40) -> str:
    """A name on one line, shortened to ``length`` characters, without control characters."""
    name = ' '.join(str(name).encode(errors='replace').decode().split())
    name = ''.join(c if ord(c) >= 32 and c != '\x7f' else '?' for c in name)
    return name if len(name) <= length else f'{name[: length - 3]}...'


@contextlib.contextmanager
def legible(texts: Iterable[str]) -> Iterator[None]:
    """Make matplotlib draw texts literally: ``$`` starts no formula, and a font with their characters is used.

    If this machine has no such font, boxes are drawn and one warning is logged.
    """
    family = _family_with(frozenset(''.join(drawable(text, len(text)) for text in texts)) - set(string.printable))
    fonts = {'text.parse_math': False, 'text.usetex': False}
    if family:
        fonts['font.family'] = [*rcParams['font.family'], family]  # matplotlib's fallback finds other characters
        for generic in ('sans-serif', 'monospace'):  # the toolboxes' visualizers name these, which have no fallback
            fonts[f'font.{generic}'] = [family, *rcParams[f'font.{generic}']]
    with rc_context(fonts), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')
        yield


@functools.cache
def _family_with(characters: frozenset[str]) -> str | None:
    """The font family with most of these characters; None if the default has them all, or no family has any."""
    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    needed = {ord(character) for character in characters} - default.keys()
    if not needed:
        return None
    known = {str(font.fname) for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:  # installed after matplotlib listed the fonts
        with contextlib.suppress(Exception):  # of unreadable fonts
            font_manager.fontManager.addfont(path)
    regular = [font for font in font_manager.fontManager.ttflist if font.style == 'normal' and font.weight == 400]
    best = max(regular, key=lambda font: len(needed & _charmap(font.fname)))
    found = needed & _charmap(best.fname)
    if found != needed:
        missing = ''.join(sorted(map(chr, needed - found)))
        print_log(
            f'Pictures show boxes in place of {missing[:40]}: matplotlib finds no font with all characters of the '
            'names. Install one, such as Noto Sans CJK (fonts-noto-cjk on Debian and Ubuntu)',
            logger='current',
            level=logging.WARNING,
        )
    return best.name if found else None


def _charmap(path: str) -> set[int]:
    """The characters of a font; none if it has no letters, or draws a box for every character."""
    with contextlib.suppress(Exception):  # of unreadable fonts
        found = set(font_manager.get_font(path).get_charmap())
        if found >= set(map(ord, string.ascii_letters + string.digits)) and 'LastResort' not in path:
            return found
    return set()


def _legible_texts(plot: Callable) -> Callable:
    """Decorator that draws all texts in a function's arguments literally; the last argument is the file."""

    @functools.wraps(plot)
    def run(*args) -> None:
        with legible([str(args[:-1])]):
            plot(*args)

    return run


@_legible_texts
def plot_curves(panels: dict[str, dict[str, Curve]], x_label: str | Sequence[str], path: Path) -> None:
    """Plot one panel per quantity, side by side, to a PNG file.

    ``panels``: title of each -> label of each curve in it -> its points. ``x_label`` is for all panels, or one per
    panel.
    """
    figure = Figure(figsize=(5 * len(panels), 4), layout='constrained')
    labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
    for axes, (title, curves), x_label in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), labels
    ):
        for label, (x, y) in curves.items():
            name = drawable(label)
            name = f' {name}' if name.startswith('_') else name  # matplotlib leaves such names out of a legend
            axes.plot(x, y, label=name, marker='o' if len(x) < 40 else None, markersize=3)
        axes.set(title=drawable(title), xlabel=drawable(x_label))
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


@_legible_texts
def plot_confusion(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix of class indices (N, ) to a PNG file.

    It shows counts for up to 30 classes, and the fraction of each true class as a color beyond.
    """
    classes = list(map(drawable, classes))
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
        axes.set_xticks(range(count), classes, rotation=turned, fontsize=size)
        axes.set_yticks(range(count), classes, fontsize=size)
    if few:
        for (row, column), number in np.ndenumerate(matrix):
            color = 'white' if number > matrix.max() / 2 else 'black'
            axes.text(column, row, number, ha='center', va='center', color=color)
    else:
        figure.colorbar(picture, shrink=0.6, label='Fraction of the true class')
    axes.set_title(f'{np.mean(labels == predictions):.2%} of {len(labels)} correct')
    figure.savefig(path, dpi=120)


@_legible_texts
def plot_predictions(samples: list[tuple[np.ndarray, str, str]], title: str, path: Path) -> None:
    """Plot a sheet of images with their predictions to a PNG file; wrong ones are red and show the true class.

    ``samples``: image (H, W, 3) in RGB from 0 to 255, predicted class and true class of each.
    """
    columns = 10
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(1.3 * columns, 1.65 * rows + 0.5), layout='constrained')
    figure.suptitle(drawable(title, 120))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis('off')
    for axes, (image, predicted, true) in zip(grid, samples):
        axes.imshow(image.astype(np.uint8))
        right = predicted == true
        predicted, true = drawable(predicted, 16), drawable(true, 16)
        space = '\n' if len(predicted + true) > 12 else ' '
        words = predicted if right else f'{predicted}{space}(is {true})'
        axes.set_title(words, fontsize=8, color='green' if right else 'red')
    figure.savefig(path, dpi=120)


@_legible_texts
def plot_fields(panels: dict[str, tuple[np.ndarray, tuple[float, float], Sequence[float]]], path: Path) -> None:
    """Plot receptive fields side by side to a PNG file, on a logarithmic scale from 1e-4 to 1 of each field's maximum.

    ``panels``: title -> contributions (H, W); row and column of their center; sides of the 50 % and 99 % squares.
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
        axes.set_title(f'{drawable(title)}\n50 %: {sides[0]:g} px, 99 %: {sides[1]:g} px', fontsize=10)
    figure.colorbar(picture, ax=grid, shrink=0.8, label='contribution / maximum')
    figure.savefig(path, dpi=90)
