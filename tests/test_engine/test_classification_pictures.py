"""The sheet of predictions at the end of a classification run."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.models import AverageClsScoreTTA, ImageClassifier
from mmpretrain.structures import DataSample
from torch import nn

from mmstrip.engine.hooks import classification_pictures
from mmstrip.engine.hooks.classification_pictures import ClassificationReportHook, choose_samples


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def test_the_sheet_shows_samples_of_many_classes_and_wrong_ones_first():
    """Of a data set in the order of its classes, ten of each."""
    labels = np.arange(1000) // 10
    right = np.arange(1000) % 4 > 0
    chosen = choose_samples(labels, right, 20)
    assert chosen == choose_samples(labels, right, 20) and len(set(chosen)) == 20
    assert right[chosen].tolist() == [False] * 10 + [True] * 10
    for part in (labels[chosen[:10]].tolist(), labels[chosen[10:]].tolist()):
        assert part == sorted(part) and len(set(part)) > 5 and min(part) < 40 and max(part) > 60
    right[:] = False
    right[7] = True
    assert choose_samples(labels, right, 20)[-1] == 7 and len(choose_samples(labels[:6], right[:6], 20)) == 6


@pytest.mark.parametrize('kind', ['in order', 'shuffled', 'pairs'])
def test_the_sheet_shows_the_images_that_were_predicted(kind, tmp_path, monkeypatch):
    """In RGB, with and without views; not those of a loader that shuffles, whose order is not known afterwards."""
    drawn = []
    monkeypatch.setattr(classification_pictures, 'plot_predictions', lambda samples, *_: drawn.extend(samples))
    images = [torch.stack([torch.full((2, 2), 10.0 * i + channel) for channel in range(3)]) for i in range(4)]

    class Dataset(list):
        metainfo = dict(classes=('cat', 'dog', 'ox', 'yak'))

    samples = [DataSample().set_gt_label(i).set_pred_label(min(i, 2)) for i in range(4)]
    dataset = Dataset(dict(inputs=image, data_samples=sample) for image, sample in zip(images, samples))
    dataset[0] = dict(inputs=[images[0]] * 2, data_samples=[samples[0]] * 2)
    model = ImageClassifier(nn.Identity(), data_preprocessor=dict(to_rgb=True))
    runner = SimpleNamespace(model=model, log_dir=tmp_path, logger=logging.getLogger('report'))
    runner.test_dataloader = SimpleNamespace(dataset=dataset)
    hook = ClassificationReportHook()
    if kind == 'pairs':
        dataset[:] = zip(images, range(4))
    for sample in samples[::-1] if kind == 'shuffled' else samples:
        hook.after_test_iter(runner, 0, None, [sample])
    hook.after_test_epoch(runner)
    assert (tmp_path / 'confusion_matrix.png').exists()
    expected = [(32, 'ox', 'yak'), (2, 'cat', 'cat'), (12, 'dog', 'dog'), (22, 'ox', 'ox')]
    assert [(image[0, 0, 0], *names) for image, *names in drawn] == (expected if kind == 'in order' else [])


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
    assert hook.pairs == [(1, 1)]
