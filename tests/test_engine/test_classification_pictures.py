"""The sheet of predictions at the end of a classification run."""

from types import SimpleNamespace

import numpy as np
import torch
from mmpretrain.models import AverageClsScoreTTA, ImageClassifier
from mmpretrain.structures import DataSample
from torch import nn

from mmstrip.engine.hooks.classification_pictures import ClassificationReportHook, Sheet
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


def test_averaged_augmentations_count_by_their_average():
    views = [
        DataSample().set_gt_label(1).set_pred_score(torch.tensor(scores)).set_pred_label(label)
        for scores, label in (([0.6, 0.4], 0), ([0.1, 0.9], 1))
    ]
    model = AverageClsScoreTTA(ImageClassifier(nn.Identity()))
    hook = ClassificationReportHook()
    images = [torch.zeros(1, 3, 2, 2)] * 2
    hook.after_test_iter(SimpleNamespace(model=model), 0, dict(inputs=images), model.merge_preds([views]))
    assert hook.pairs == [(1, 1)] and (hook.right.seen, hook.wrong.seen) == (1, 0)
