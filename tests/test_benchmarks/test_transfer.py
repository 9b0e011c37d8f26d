"""The comparison of starts by transfer learning, with as few images as it takes to run."""

import json

import pytest
import torch
from helpers import last_line
from helpers.runs import call_tool
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from benchmarks.transfer import BACKBONES, TASKS, task_config
from mmstrip.datasets.digit_scenes import write_digit_scenes

SHORT = [
    '--cfg-options',
    'train_cfg.max_epochs=1',
    'param_scheduler=None',
    'model.backbone.arch.depths=[1,1,1,1]',
    'train_dataloader.batch_size=16',
    *(f'{split}_dataloader.dataset.indices=32' for split in ('train', 'val', 'test')),
]


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'scenes'
    write_digit_scenes(folder, num_train=32, num_val=32, size=64)
    return folder


def test_transfer_is_compared_in_a_table_and_pictures(scenes, tmp_path):
    """One short run of each kind; what has its result is not computed again."""
    arguments = ['benchmarks.transfer', '--work-dir', tmp_path, '--data', scenes, '--tasks', 'segmentation']
    first = call_tool(*arguments, '--starts', 'classifier', *SHORT, folder=tmp_path)
    assert first.returncode == 0, first.stdout
    assert first.stdout.count('load backbone. in model from:') == 1
    done = call_tool(*arguments, *SHORT, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('Skipping the finished run') == 2 and 'load backbone. in model from:' not in done.stdout
    results = json.loads((tmp_path / 'results.json').read_text())
    assert [(result['task'], result['start']) for result in results] == [
        ('segmentation', 'classifier'),
        ('segmentation', 'scratch'),
    ]
    assert all(0 < result['mIoU'] < 1 for result in results)
    for name in ('curves.png', 'predictions.png'):
        assert Image.open(tmp_path / name).height > 300 and name in done.stdout
    again = call_tool(*arguments, *SHORT, folder=tmp_path)
    assert again.returncode == 0 and 'Epoch(train)' not in again.stdout
    assert json.loads((tmp_path / 'results.json').read_text()) == results
    other = call_tool(*arguments, folder=tmp_path)
    assert 'holds a run with other settings' in last_line(other.stdout)
    wrong = call_tool(*arguments, '--backbones', 'resnet5', folder=tmp_path)
    assert wrong.returncode != 0 and 'resnet18' in last_line(wrong.stdout)


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
