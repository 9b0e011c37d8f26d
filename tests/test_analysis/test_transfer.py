"""Backbones that are compared by transfer learning."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmstrip.analysis.transfer import BACKBONES, TASKS, task_config


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_backbones_to_compare_fit_into_the_same_models(backbone, task):
    config = task_config(backbone, task, 'nowhere')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    features = model.backbone(torch.rand(2, 3, 96, 96))
    assert [feature.shape[1] for feature in features] == list(BACKBONES[backbone].channels)
    assert [feature.shape[2] for feature in features] == [24, 12, 6, 3]
    assert all(feature.shape[1] == 64 for feature in model.neck(features))
