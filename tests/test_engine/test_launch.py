"""What is looked for before anything is built."""

import pytest
from helpers import ROOT
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


def test_the_evaluators_annotations_are_named_with_the_folder():
    config = Config.fromfile(ROOT / 'configs/detection/retinanet_strip-mlp-tiny_fpn_1x_coco.py')
    config.merge_from_dict({'val_dataloader.dataset.data_root': 'gone/', 'val_evaluator.ann_file': 'gone/val.json'})
    with pytest.raises(
        FileNotFoundError, match=r'val_dataloader.dataset.data_root=FOLDER val_evaluator.ann_file=FILE$'
    ):
        check_data(config, ['val_dataloader'])
