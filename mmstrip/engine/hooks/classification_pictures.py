"""Confusion matrix and a sheet of predictions at the end of a classification run."""

import numpy as np
import torch
from mmengine.dist import collect_results
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from ...registry import HOOKS
from ...utils.plots import plot_confusion, plot_predictions
from ...utils.wrappers import unwrap_model
from .curves import log_folder


def _has_one_label(sample) -> bool:
    labels = [getattr(sample, name, None) for name in ('pred_label', 'gt_label')]
    return all(isinstance(label, Tensor) and label.numel() == 1 for label in labels)


@HOOKS.register_module()
class ClassificationReportHook(Hook):
    """Draw a confusion matrix and a sheet of predictions, and log where they are.

    After training, they show the last validation; after testing, the test. The PNG files go to the run's log folder,
    ``{work_dir}/{timestamp}/``. Nothing is drawn unless each data sample has one ``pred_label`` and one ``gt_label``,
    as in mmpretrain's single-label tasks. There is no sheet if the loader does not follow the dataset's order.

    Args:
        sheet_size (int): Images on the sheet, see :func:`choose_samples`. Defaults to 60.
    """

    priority = 'LOW'

    def __init__(self, sheet_size: int = 60):
        self.sheet_size = sheet_size
        self.pairs: list[tuple | None] = []  # (true, predicted) per sample; None unless it has both

    def before_val_epoch(self, runner: Runner) -> None:
        self.pairs = []

    before_test_epoch = before_val_epoch

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        if not all(map(_has_one_label, outputs)):
            self.pairs += [None] * len(outputs)
            return
        # From scores, like mmpretrain's metrics: test-time augmentation keeps the label of the first view.
        found = [s.pred_score.argmax() if 'pred_score' in s else s.pred_label for s in outputs]
        # All at once, because each read from a GPU takes time.
        labels = (
            torch.cat([label.reshape(1) for label in column]) for column in ([s.gt_label for s in outputs], found)
        )
        self.pairs += zip(*(label.tolist() for label in labels))

    after_test_iter = after_val_iter

    def after_train(self, runner: Runner) -> None:
        if runner.val_loop is not None:
            self._report(runner, runner.val_dataloader.dataset)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._report(runner, runner.test_dataloader.dataset)

    def _report(self, runner: Runner, dataset) -> None:
        pairs = collect_results(self.pairs, len(dataset), device='cpu')
        if not pairs or None in pairs:
            return
        labels, predictions = np.array(pairs).T
        classes = list(dataset.metainfo.get('classes') or ())
        highest = max(labels.max(), predictions.max())  # a head may have more classes
        classes += map(str, range(len(classes), highest + 1))
        split = getattr(dataset, 'split', None) or 'held-out'
        right = labels == predictions
        accuracy = f'{split.capitalize()} top-1 {right.mean():.2%} ({right.sum()} of {len(labels)} images)'
        folder = log_folder(runner)
        plot_confusion(labels, predictions, classes, folder / 'confusion_matrix.png')
        runner.logger.info(f'Confusion matrix: {folder / "confusion_matrix.png"}')
        indices = choose_samples(labels, right, self.sheet_size)
        samples = [_first_view(dataset[index]) for index in indices]
        if [label for _, label in samples] == labels[indices].tolist():
            bgr = getattr(unwrap_model(runner.model).data_preprocessor, 'to_rgb', False)
            images = [(image.flip(0) if bgr else image).permute(1, 2, 0).numpy() for image, _ in samples]
            names = [[classes[found[index]] for index in indices] for found in (predictions, labels)]
            plot_predictions(list(zip(images, *names)), accuracy, folder / 'predictions.png')
            runner.logger.info(f'Images with predictions: {folder / "predictions.png"}')
        runner.logger.info(accuracy)


def choose_samples(labels: np.ndarray, right: np.ndarray, count: int) -> list[int]:
    """Choose samples for a sheet at random, the same each time: misclassified ones first, each part by true class.

    Args:
        labels: True classes (N, ).
        right: Whether each prediction is correct (N, ).
        count: Number of samples; at least half of them are correct, if there are that many.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    wrong, good = order[~right[order]], order[right[order]]
    wrong = wrong[: count - min(len(good), count // 2)]
    good = good[: count - len(wrong)]
    return [int(index) for part in (wrong, good) for index in part[labels[part].argsort(kind='stable')]]


def _first_view(sample) -> tuple[Tensor | None, int | None]:
    """Image (C, H, W) and label of a sample; with test-time augmentation, which gives lists, of the first view."""
    parts = [sample.get(key) if isinstance(sample, dict) else None for key in ('inputs', 'data_samples')]
    image, labelled = (part[0] if isinstance(part, list) else part for part in parts)
    label = getattr(labelled, 'gt_label', None)
    return image, label.item() if isinstance(label, Tensor) and label.numel() == 1 else None
