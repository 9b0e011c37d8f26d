"""Layer-wise learning rates, in all three toolboxes."""

import pytest
import torch
from helpers import ROOT, small_backbone
from helpers.configs import build_model
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

CONSTRUCTOR, DECAY = 'mmstrip.LayerDecayOptimWrapperConstructor', dict(layer_decay_rate=0.5)
CONFIGS = (
    'strip_mlp/strip-mlp-tiny_in1k-pre_1xb64-layer-decay_cars.py',
    'detection/mask-rcnn_strip-mlp-tiny_fpn_layer-decay-1x_coco.py',
    'segmentation/strip-mlp-tiny_upernet_8xb2-160k_ade20k-512x512.py',
)


@pytest.mark.parametrize('name', CONFIGS)
def test_each_layer_learns_slower_than_the_one_above(name):
    config = Config.fromfile(ROOT / 'configs' / name)
    config.optim_wrapper.constructor = CONSTRUCTOR
    config.optim_wrapper.paramwise_cfg.setdefault('layer_decay_rate', 0.8)
    model = build_model(config)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    base, layers = config.optim_wrapper.optimizer, 2 + 18
    expected = {'backbone.patch_embed.weight': 0, 'backbone.stages.0.0.channel_mixing.fc1.weight': 1}
    expected.update({'backbone.merging.0.weight': 3, 'backbone.stages.2.11.strip_mixing.fuse.weight': 16})
    parameters = dict(model.named_parameters())
    for key, depth in expected.items():
        assert rates[id(parameters[key])] == pytest.approx(base.lr * 0.8 ** (layers - 1 - depth)), key
    for key, parameter in parameters.items():
        if not key.startswith('backbone'):
            assert rates[id(parameter)] == base.lr, key
    # All else is as without it.
    config.optim_wrapper.pop('constructor')
    config.optim_wrapper.paramwise_cfg.pop('layer_decay_rate')
    plain = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert {id(p): g['weight_decay'] for g in plain.param_groups for p in g['params']} == decays


@pytest.mark.parametrize(
    'paramwise, words',
    [(dict(layer_decay_rate=rate), 'must be a number above 0 and at most 1, but got') for rate in (0, 1.5, 'much')]
    + [
        ({}, 'layer_decay_rate must be .* but got None'),
        (DECAY, 'needs a backbone with get_layer_depth, but .*Linear'),
    ],
)
def test_wrong_rates_and_models_without_depths_are_refused(paramwise, words):
    config = dict(constructor=CONSTRUCTOR, optimizer=dict(type='SGD', lr=1.0), paramwise_cfg=paramwise)
    with pytest.raises(ValueError, match=words):
        build_optim_wrapper(nn.Linear(2, 2), config)


def test_all_backbones_under_any_name_and_in_wrappers():
    """Each with its own depths; what is not theirs keeps its rate."""
    model = nn.Module()
    model.backbone, model.second = small_backbone(), small_backbone(arch=dict(embed_dims=16, depths=(1, 1, 1, 1)))
    model.twin = nn.ModuleDict(dict(model=torch.compile(small_backbone())))
    model.twin['model']._orig_mod.stages[0][0] = checkpoint_wrapper(model.twin['model']._orig_mod.stages[0][0])
    model.head = nn.Linear(2, 2)
    config = dict(constructor=CONSTRUCTOR, optimizer=dict(type='SGD', lr=1.0), paramwise_cfg=DECAY)
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    rates = {id(p): group['lr'] for group in groups for p in group['params']}
    twin = model.twin['model']._orig_mod
    assert rates[id(model.backbone.patch_embed.weight)] == rates[id(twin.patch_embed.weight)] == 0.5**6
    assert rates[id(model.second.patch_embed.weight)] == 0.5**5
    assert {rates[id(parameter)] for parameter in twin.stages[0].parameters()} == {0.5**5}
    assert rates[id(twin.stages[2][1].channel_mixing.fc1.weight)] == 0.5**2
    assert rates[id(model.head.weight)] == 1.0
