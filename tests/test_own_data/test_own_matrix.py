"""What is written trains, tests and exports: tasks, models, with a checkpoint and without, with a size and without."""

import os
import re
from unittest import mock

import pytest
import torch
from helpers.own_data import write_classes, write_coco, write_pairs
from mmengine.runner import Runner

from mmstrip.deployment.export import Export, export_model
from mmstrip.deployment.formats import SUFFIXES
from mmstrip.engine.launch import build_runner
from mmstrip.models import StripMLP
from mmstrip.own_data import write_classification, write_detection, write_segmentation
from mmstrip.utils.config import load_config

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1))
# Fewer channels and layers, so that it takes seconds.
RCNN = {
    'model.neck.out_channels': 32,
    'model.rpn_head.in_channels': 32,
    'model.rpn_head.feat_channels': 32,
    'model.roi_head.bbox_roi_extractor.out_channels': 32,
    'model.roi_head.bbox_head.in_channels': 32,
    'model.roi_head.bbox_head.fc_out_channels': 32,
    'model.train_cfg.rcnn.sampler.num': 16,
    'model.test_cfg.rpn.max_per_img': 50,
}
DINO = {
    'model.encoder.num_layers': 1,
    'model.decoder.num_layers': 1,
    'model.num_queries': 100,
    'model.test_cfg.max_per_img': 100,
}
FPN = {'model.neck.out_channels': 16, 'model.decode_head.in_channels': [16] * 4, 'model.decode_head.channels': 16}
UPERNET = {'model.decode_head.channels': 16, 'model.auxiliary_head.channels': 16}
SEGFORMER = {'model.decode_head.channels': 16}
TASKS = {
    'classification': (write_classification, lambda root: write_classes(root, 'ab', 3), 'accuracy/top1'),
    'detection': (write_detection, write_coco, 'coco/bbox_mAP'),
    'segmentation': (write_segmentation, lambda root: write_pairs(root, '012345'), 'mIoU'),
}


@pytest.fixture(scope='module')
def init(tmp_path_factory):
    path = tmp_path_factory.mktemp('init') / 'classifier.pth'
    weights = StripMLP(ARCH, img_size=32).state_dict()
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in weights.items()}), path)
    return path


def predict(task, config, checkpoint, options):
    """In the toolbox's own words, for a picture of the training."""
    if task == 'detection':
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(config, checkpoint, device='cpu', cfg_options=options)
        assert model.dataset_meta['classes'] == ['cell']
        assert inference_detector(model, 'data/1.jpg').pred_instances.bboxes.shape[1] == 4
    elif task == 'segmentation':
        from mmseg.apis import inference_model, init_model

        model = init_model(config, checkpoint, device='cpu', cfg_options=options)
        assert model.dataset_meta['classes'] == ['0', '1']
        assert inference_model(model, 'data/images/0.png').pred_sem_seg.data.shape == (1, 48, 64)


def run(config, work_dir, options, **more) -> Runner:
    loaded = load_config(str(config), {**options, **more})
    loaded.work_dir = str(work_dir)
    for loader in ('train', 'val', 'test'):
        loaded[f'{loader}_dataloader'].update(num_workers=0, persistent_workers=False)
    return build_runner(loaded)


@pytest.mark.parametrize(
    'task, model, starts, size, part, options',
    [
        # Of each task one is exported, the cheapest to ONNX; tests/test_deployment exports the others' kinds.
        ('classification', None, False, None, None, {}),
        ('classification', None, True, 64, 'whole', {}),
        ('detection', 'faster-rcnn', False, None, 'neck', RCNN),
        ('detection', 'faster-rcnn', True, 96, None, RCNN),
        ('detection', 'dino', False, 320, None, DINO),
        ('segmentation', 'fpn', False, None, None, FPN),
        ('segmentation', 'upernet', True, 64, 'whole', UPERNET),
        ('segmentation', 'segformer', False, None, None, SEGFORMER),
    ],
)
def test_every_config_trains_tests_and_exports(task, model, starts, size, part, options, init, tmp_path):
    writer, make, metric = TASKS[task]
    make(tmp_path / 'data')
    asked = dict(init=init if starts else None, size=size, batch_size=2, epochs=2 if task == 'classification' else 1)
    with mock.patch.dict(StripMLP.arch_zoo, {'tiny-light': ARCH}):  # what a config from scratch names
        config = writer('data', **asked, **({'model': model} if model else {})).config
        runner = run(config, tmp_path / 'run', options)
        heads = [getattr(runner.model, name, None) for name in ('head', 'bbox_head', 'decode_head', 'roi_head')]
        heads = [getattr(head, 'bbox_head', head) for head in heads if head is not None]
        assert [head.num_classes for head in heads] == [1 if task == 'detection' else 2]
        assert runner.model.backbone.embed_dims == 8
        runner.train()
        assert all(torch.isfinite(value).all() for value in runner.model.state_dict().values())
        checkpoint = (tmp_path / 'run' / 'last_checkpoint').read_text()
        tested = run(config, tmp_path / 'test', options, load_from=checkpoint).test()
        assert any(re.fullmatch(metric, key) for key in tested), tested
        if starts:
            predict(task, str(config), checkpoint, options)
        if part is None:
            return
        form = 'onnx' if task == 'classification' else 'torch-export'
        settings, out = Export(form, part, None if part == 'whole' else (64, 64)), f'model{SUFFIXES[form]}'
        difference = export_model(str(config), checkpoint, out, settings, options)
    assert os.path.getsize(out) > 1000 and (difference is None or difference < 1e-4)
