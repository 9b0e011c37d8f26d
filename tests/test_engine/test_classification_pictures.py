"""The sheet of predictions at the end of a classification run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.models import AverageClsScoreTTA, ImageClassifier
from mmpretrain.structures import DataSample
from torch import nn

from mmstrip.engine.hooks.classification_pictures import ClassificationReportHook, Sheet
from mmstrip.utils.plots import plot_confusion, plot_predictions


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


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


@pytest.mark.parametrize('labels', [[1, 0], []])
@pytest.mark.parametrize('kind', ['gt_label', 'pred_label'])
def test_data_with_several_labels_an_image_are_not_reported(kind, labels, tmp_path):
    """Not even the images among them that have one."""
    samples = [DataSample().set_gt_label(1).set_pred_label(1).set_pred_score([0.3, 0.7]) for _ in range(4)]
    setattr(samples[3], kind, torch.tensor(labels, dtype=torch.long))
    runner = SimpleNamespace(model=ImageClassifier(nn.Identity()), log_dir=tmp_path)
    hook = ClassificationReportHook()
    for pair in (samples[:2], samples[2:]):
        hook.after_test_iter(runner, 0, dict(inputs=torch.zeros(2, 3, 2, 2)), pair)
    runner.test_dataloader = SimpleNamespace(dataset=[None] * 4)
    hook.after_test_epoch(runner)
    assert hook.pairs == [(1, 1), (1, 1), None, None] and not list(tmp_path.iterdir())


@pytest.mark.parametrize('outputs', [torch.zeros(2, 3), [dict(gt_label=1)] * 2, [SimpleNamespace()] * 2])
def test_outputs_of_other_models_are_not_reported(outputs):
    """Nor is their batch read."""
    hook = ClassificationReportHook()
    hook.after_val_iter(None, 0, None, outputs)
    assert hook.pairs == [None, None]


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
