"""tools/transfer.py, with as few images as it takes to run."""

import json

import pytest
from helpers import last_line
from helpers.runs import call_tool
from PIL import Image

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
    arguments = ['transfer.py', '--work-dir', tmp_path, '--data', scenes, '--tasks', 'segmentation']
    first = call_tool(*arguments, '--starts', 'classifier', *SHORT, folder=tmp_path)
    assert first.returncode == 0, first.stdout
    assert first.stdout.count('load backbone. in model from:') == 1
    done = call_tool(*arguments, *SHORT, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('Keeping the results') == 2 and 'load backbone. in model from:' not in done.stdout
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
