"""What is looked for before anything is built."""

import pytest
from mmengine.config import Config

from mmstrip.engine.launch import check_data


def test_missing_data_inside_wrappers(tmp_path):
    inner = [dict(type='CustomDataset', data_root=str(tmp_path)), dict(type='CustomDataset', data_root='/gone')]
    concat = dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=inner))
    config = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=concat)))
    words = r'train_dataloader.dataset.dataset.datasets.1.data_root: no folder /gone'
    with pytest.raises(FileNotFoundError, match=words):
        check_data(config, ['train_dataloader', 'val_dataloader'])
    inner[1]['data_root'] = str(tmp_path)
    config = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=concat)))
    check_data(config, ['train_dataloader', 'val_dataloader'])
