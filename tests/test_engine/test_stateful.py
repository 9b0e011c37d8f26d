"""Transforms whose state no checkpoint holds."""

import logging
from types import SimpleNamespace

import pytest
from mmdet.datasets.transforms import CachedMixUp, CachedMosaic, Mosaic, RandomFlip
from mmdet.models.data_preprocessors import BatchSyncRandomResize, DetDataPreprocessor
from mmengine.dataset import BaseDataset, ConcatDataset
from mmseg.datasets.transforms import LoadAnnotations, RandomMosaic
from torch import nn

from mmstrip.engine.hooks import SeedHook
from mmstrip.engine.stateful import keeps_state


class Counts:
    def __init__(self):
        self.seen, self.sums = 0, {}

    def __call__(self, results):
        self.seen += 1
        return results


class Sums(Counts):
    def __call__(self, results):
        self.sums['all'] = results
        return results


class Inherits(Counts):
    pass


class Plain:
    def __init__(self):
        self.parts, self.size = {}, None
        self.parts['all'] = []
        self.parts.update(one=1)

    def __call__(self, results):
        if self.size is None:
            self.size = len(results)
        self.first = results[0]
        return self.first


@pytest.mark.parametrize(
    'kind',
    [CachedMosaic, CachedMixUp, BatchSyncRandomResize, Counts, Sums, Inherits],
    ids=lambda kind: kind.__name__,
)
def test_state_is_seen(kind):
    assert keeps_state(kind)


@pytest.mark.parametrize('kind', [Mosaic, RandomFlip, LoadAnnotations, RandomMosaic, DetDataPreprocessor, Plain, dict])
def test_other_transforms_have_none(kind):
    assert not keeps_state(kind)


def test_a_config_with_state_is_warned_of(caplog):
    inner = BaseDataset(serialize_data=False, lazy_init=True, pipeline=[Plain(), Sums()])
    both = ConcatDataset([inner, BaseDataset(lazy_init=True, pipeline=[CachedMixUp()])], lazy_init=True)
    model = nn.Module()
    model.data_preprocessor = DetDataPreprocessor()
    model.data_preprocessor.batch_augments = nn.ModuleList([BatchSyncRandomResize((32, 64))])
    runner = SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=both), model=model, logger=logging.getLogger('warned')
    )
    SeedHook().before_train(runner)
    start = 'Sums, CachedMixUp, BatchSyncRandomResize: its state is not in checkpoints'
    assert [message[: len(start)] for message in caplog.messages] == [start]
    inner.pipeline.transforms.pop()
    runner.train_dataloader.dataset, model.data_preprocessor = inner, DetDataPreprocessor()
    SeedHook().before_train(runner)
    assert len(caplog.messages) == 1
