"""Confusion matrix and a sheet of predictions at the end of a classification run."""

import random

import numpy as np
import torch
from mmengine.dist import collect_results
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from ...registry import HOOKS
from ...utils.plots import plot_confusion, plot_predictions
from .curves import log_folder
from .pictures import inputs_of


class Sheet:
    """Some of the samples that are offered, each as likely as the others: data sets are often in the order of classes.

    Args:
        size (int): How many are kept.
    """

    def __init__(self, size: int):
        self.size = size
        self.seen = 0
        self._kept: list[tuple] = []
        self._random = random.Random(0)

    def offer(self, image: Tensor, predicted: int, true: int, bgr: bool = False) -> None:
        """Keep an image, (C, H, W), in place of another one, or not; a copy in RGB, as a view would keep its batch."""
        self.seen += 1
        place = len(self._kept) if len(self._kept) < self.size else self._random.randrange(self.seen)
        if place < self.size:
            image = image.flip(0) if bgr else image.clone()
            self._kept[place : place + 1] = [(image.permute(1, 2, 0).cpu().numpy(), predicted, true)]

    def chosen(self, count: int) -> list[tuple]:
        """So many of them, as (image, predicted, true) by their true class; images (H, W, C)."""
        return sorted(self._kept[:count], key=lambda sample: sample[2])


def _has_one_label(sample) -> bool:
    labels = [getattr(sample, name, None) for name in ('pred_label', 'gt_label')]
    return all(isinstance(label, Tensor) and label.numel() == 1 for label in labels)


@HOOKS.register_module()
class ClassificationReportHook(Hook):
    """Draw the confusion matrix and a sheet of predictions, and say where they are.

    After training: of the last validation; after testing: of the test. The PNG files go to the run's log folder,
    ``{work_dir}/{timestamp}/``. Needs data samples with one ``pred_label`` and one ``gt_label`` each, as mmpretrain's
    for one label an image; where one is without them, as of several labels an image, it stays silent.

    Args:
        sheet_size (int): Images on the sheet, drawn at random (the same ones in each run): wrong predictions first, at
            most half of it where there are right ones to fill the rest. Defaults to 60.
    """

    priority = 'LOW'

    def __init__(self, sheet_size: int = 60):
        self.sheet_size = sheet_size
        self._clear()

    def _clear(self) -> None:
        self.pairs: list[tuple | None] = []  # (true, predicted) of every sample, None without one label of each
        self.right = Sheet(self.sheet_size)
        self.wrong = Sheet(self.sheet_size)

    def before_val_epoch(self, runner: Runner) -> None:
        self._clear()

    before_test_epoch = before_val_epoch

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        if not all(map(_has_one_label, outputs)):
            self.pairs += [None] * len(outputs)
            return
        images, bgr = inputs_of(runner, data_batch)
        # By score as mmpretrain's metrics: where it averages augmentations, it leaves the label of the first one.
        found = [s.pred_score.argmax() if 'pred_score' in s else s.pred_label for s in outputs]
        # All at once, as each reading of a GPU takes its time.
        labels = (
            torch.cat([label.reshape(1) for label in column]) for column in ([s.gt_label for s in outputs], found)
        )
        for image, true, predicted in zip(images, *(label.tolist() for label in labels)):
            self.pairs.append((true, predicted))
            sheet = self.right if true == predicted else self.wrong
            sheet.offer(image, predicted, true, bgr)

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
        highest = max(labels.max(), predictions.max())  # heads may have more
        classes += map(str, range(len(classes), highest + 1))
        split = getattr(dataset, 'split', None) or 'held-out'
        right = np.sum(labels == predictions)
        accuracy = f'{split.capitalize()} top-1 {right / len(labels):.2%} ({right} of {len(labels)} images)'
        folder = log_folder(runner)
        confusion, sheet = folder / 'confusion_matrix.png', folder / 'predictions.png'
        plot_confusion(labels, predictions, classes, confusion)
        wrong = self.wrong.chosen(self.sheet_size - min(self.right.seen, self.sheet_size // 2))
        samples = wrong + self.right.chosen(self.sheet_size - len(wrong))
        plot_predictions(
            [(image, classes[predicted], classes[true]) for image, predicted, true in samples], accuracy, sheet
        )
        runner.logger.info(f'Confusion matrix: {confusion}')
        runner.logger.info(f'Images with predictions: {sheet}')
        runner.logger.info(accuracy)
