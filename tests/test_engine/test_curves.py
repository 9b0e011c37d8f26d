"""Where the points of a validation curve are, and which learning rates are drawn."""

from types import SimpleNamespace

import pytest
from mmengine.runner import EpochBasedTrainLoop

from mmstrip.engine.hooks.curves import _rates, validation_curve


@pytest.mark.parametrize(
    'last, interval, validated, places',
    [(9, 3, 3, [3, 6, 9]), (10, 3, 4, [3, 6, 9, 10]), (2, 5, 1, [2]), (10, 3, 2, [9, 10])],
)
def test_places_of_validations(last, interval, validated, places):
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop.val_interval = interval
    hub = SimpleNamespace(get_scalar=lambda name: SimpleNamespace(data=([0.5] * validated, None)))
    found, values = validation_curve(SimpleNamespace(train_loop=loop, epoch=last, message_hub=hub), 'val/mIoU')
    assert list(found) == places and len(values) == validated


def test_learning_rates_of_one_optimizer_or_several():
    for logged, drawn in (
        (['train/lr', 'train/base_lr', 'train/loss', 'val/lr'], {'': 'train/base_lr'}),
        (['train/lr', 'train/loss_lr'], {'': 'train/lr'}),
        (['train/g.lr', 'train/g.base_lr', 'train/d.lr'], {'g': 'train/g.base_lr', 'd': 'train/d.lr'}),
        (['train/loss'], {}),
    ):
        assert _rates(logged) == _rates(logged[::-1]) == drawn
