"""The sheet of predictions at the end of a classification run."""

import numpy as np
import torch

from mmstrip.engine.hooks.report import Sheet
from mmstrip.utils.plots import plot_confusion, plot_predictions


def offered(size, count):
    sheet = Sheet(size)
    for i in range(count):
        sheet.offer(torch.full((3, 2, 2), i), 0, i // 10)  # ten of each class in turn
    return sheet


def test_samples_of_a_sorted_data_set_are_of_many_classes():
    chosen = offered(20, 1000).chosen(20)
    classes = [true for _, _, true in chosen]
    assert len(set(classes)) > 10 and classes == sorted(classes)
    assert all(image[0, 0, 0] // 10 == true for image, _, true in chosen)
    assert max(classes) > 60 and min(classes) < 40
    assert [true for _, _, true in offered(20, 1000).chosen(20)] == classes


def test_few_samples_are_all_kept():
    sheet = offered(20, 7)
    assert (sheet.seen, len(sheet.chosen(20)), len(sheet.chosen(3))) == (7, 7, 3)


def test_names_of_classes_are_no_formulas(tmp_path):
    names = ['a_$', '$x_', '$1']
    image = np.zeros((4, 4, 3))
    plot_predictions([(image, names[i], names[j]) for i in range(3) for j in range(3)], 'T', tmp_path / 'sheet.png')
    plot_confusion(np.arange(3), np.arange(3), names, tmp_path / 'confusion.png')
    assert len(list(tmp_path.iterdir())) == 2
