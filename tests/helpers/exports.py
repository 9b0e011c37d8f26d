"""Small networks to be exported."""

import torch
from mmengine.registry import MODELS, init_default_scope

from helpers import ROOT, randomise

CLASSES = [f'digit {i}' for i in range(10)]
SCENES = str(ROOT / 'configs/segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py')
SMALL_SCENES = {
    'model.backbone.arch': dict(embed_dims=8, depths=(1, 1, 1, 1)),
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 8,
    'model.decode_head.in_channels': [8] * 4,
    'model.decode_head.channels': 8,
}


def build_model(config):
    init_default_scope(config.default_scope)
    return MODELS.build(config.model).eval()


def write_checkpoint(config, path, classes=None):
    model = randomise(build_model(config))
    meta = dict(dataset_meta=dict(classes=classes, palette=None)) if classes else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)
