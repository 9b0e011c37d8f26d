"""Where the points of a validation curve are."""

from types import SimpleNamespace

import pytest
from mmengine.runner import EpochBasedTrainLoop

from mmstrip.engine.hooks.curves import _rates, validation_curve


@pytest.mark.parametrize(
    'last, interval, validated, places',
    [
        (9, 3, 3, [3, 6, 9]),
        (10, 3, 4, [3, 6, 9, 10]),
        (2, 5, 1, [2]),
        (5, 5, 1, [5]),
        (10, 3, 2, [9, 10]),
        (4, 1, 4, [1, 2, 3, 4]),
    ],
)
def test_places_of_validations(last, interval, validated, places):
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    loop.val_interval = interval
    scalar = SimpleNamespace(data=([0.5] * validated, None))
    hub = SimpleNamespace(get_scalar=lambda name: scalar)
    runner = SimpleNamespace(train_loop=loop, epoch=last, message_hub=hub)
    found, values = validation_curve(runner, 'val/mIoU')
    assert list(found) == places and len(values) == validated


@pytest.mark.parametrize(
    'logged, drawn',
    [
        (['train/lr', 'train/base_lr', 'train/loss', 'val/lr'], {'': 'train/base_lr'}),
        (['train/lr', 'train/loss_lr'], {'': 'train/lr'}),
        (['train/g.lr', 'train/g.base_lr', 'train/d.lr'], {'g': 'train/g.base_lr', 'd': 'train/d.lr'}),
        (['train/loss'], {}),
    ],
)
def test_learning_rates_of_one_optimizer_or_several(logged, drawn):
    assert _rates(logged) == _rates(logged[::-1]) == drawn
