"""Every config of a detector or segmentor is whole and says the recipe."""

import re

import pytest
import torch
from helpers import ROOT
from helpers.configs import COMPARED, DENSE, build_model, check_listed_size
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@pytest.mark.parametrize('path', DENSE, ids=lambda path: path.stem)
def test_dense_config_builds(path):
    config = Config.fromfile(path)
    model = build_model(config)
    check_listed_size(path, model)
    backbone = config.model.backbone
    arch = re.search(r'strip-mlp-(nano|tiny-light|tiny|small|base)_', path.stem).group(1)
    assert backbone.type == 'mmstrip.StripMLP' and (backbone.arch == arch or arch == 'nano')
    channels = [model.backbone.embed_dims * 2**i for i in backbone.out_indices]
    if 'neck' in config.model:
        assert config.model.neck.in_channels == channels
    else:
        assert config.model.decode_head.in_channels == channels
    if 'auxiliary_head' in config.model:
        assert config.model.auxiliary_head.in_channels == channels[2]
    if path.stem.endswith(('bccd', 'camvid')):
        assert backbone.init_cfg.checkpoint == f'work_dirs/strip-mlp-{arch}_1xb32_caltech101-64px/epoch_12.pth'
    elif 'digit-scenes' not in path.stem:
        assert backbone.init_cfg.checkpoint == f'checkpoints/strip-mlp-{arch}_in1k.pth'
    if 'digit-scenes' not in path.stem:
        assert backbone.init_cfg.prefix == 'backbone.'
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        for transform in loader.dataset.pipeline:
            TRANSFORMS.build(transform)
    batch = re.search(r'(\d+)xb(\d+)', path.stem)
    gpus, batch = map(int, batch.groups()) if batch else (8, 2)
    assert config.train_dataloader.batch_size == batch
    assert config.auto_scale_lr.base_batch_size == gpus * batch


@pytest.mark.parametrize('path', [path for path in COMPARED if 'fpn' in path.stem], ids=lambda path: path.stem)
def test_compared_backbones_fit_into_the_same_models(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    check_listed_size(path, model)
    features = model.backbone(torch.zeros(1, 3, 64, 96))
    assert [feature.shape[1] for feature in features] == config.model.neck.in_channels
    classifier = re.search(
        r'work_dirs/(\w+)_1xb32_caltech101-64px/epoch_12.pth', config.model.backbone.init_cfg.checkpoint
    )
    assert classifier and classifier.group(1) in path.stem


@pytest.mark.parametrize(
    'name',
    [
        'detection/mask-rcnn_strip-mlp-tiny-light_fpn_1x_coco',
        'segmentation/strip-mlp-tiny-light_upernet_8xb2-160k_ade20k-512x512',
    ],
)
def test_no_decay_on_norms_biases_and_position_tables_of_dense_models(name):
    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    model = build_model(config)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    decayed = {id(parameter): group['weight_decay'] > 0 for group in groups for parameter in group['params']}
    kinds = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    checked = 0
    for key, parameter in model.named_parameters():
        still = id(parameter) in norms or key.endswith(('bias', '.table'))
        assert decayed[id(parameter)] != still, key
        checked += key.endswith('.table')
    assert checked == 24


def test_dino_is_in_the_setting_of_mlp_dino():
    config = Config.fromfile(ROOT / 'configs/detection/dino-4scale_strip-mlp-tiny_8xb2-24e_coco.py')
    model = build_model(config)
    assert model.backbone.out_indices == (1, 2, 3) and config.train_cfg.max_epochs == 24
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    rates = {id(parameter): group['lr'] for group in optimizer.param_groups for parameter in group['params']}
    assert {rates[id(p)] for p in model.backbone.parameters() if p.requires_grad} == {1e-5}
    assert {rates[id(p)] for p in model.encoder.parameters()} == {1e-4}
    assert {group['weight_decay'] for group in optimizer.param_groups} == {1e-4}
    assert config.optim_wrapper.clip_grad.max_norm == 0.1
    for module in model.backbone.train().modules():
        if isinstance(module, _BatchNorm):
            assert not module.training and not any(p.requires_grad for p in module.parameters())
