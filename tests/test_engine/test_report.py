"""The sheet of predictions at the end of a classification run."""

import torch

from mmstrip.engine.hooks.report import Sheet


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
