"""Small networks to be exported."""

from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope

from helpers import ROOT, randomise
from helpers.runs import CONFIG
from mmstrip.utils.config import load_config

CLASSES = [f'digit {i}' for i in range(10)]
SCENES = str(ROOT / 'configs/segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py')


@MODELS.register_module()
class Stems(torch.nn.Module):
    """A backbone that is traced in no time, as Strip-MLP at any size is not: a convolution for each map."""

    def __init__(self):
        super().__init__()
        self.stems = torch.nn.ModuleList(torch.nn.Conv2d(3, 8, stride, stride) for stride in (4, 8, 16, 32))

    def forward(self, images):
        return [stem(images) for stem in self.stems]


SMALL_SCENES = {
    'model.backbone.arch': dict(embed_dims=8, depths=(1, 1, 1, 1)),
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 8,
    'model.decode_head.in_channels': [8] * 4,
    'model.decode_head.channels': 8,
}
STEMS = {**SMALL_SCENES, 'model.backbone': dict(_delete_=True, type='Stems'), 'model.neck.in_channels': [8] * 4}
DETECTORS = {
    'RetinaNet': str(ROOT / 'configs/detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py'),
    'MaskRCNN': str(ROOT / 'configs/detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py'),
    'CascadeRCNN': str(ROOT / 'configs/detection/cascade-mask-rcnn_strip-mlp-tiny-light_fpn_ms-crop-3x_coco.py'),
}
ARCH = {'model.backbone.arch': dict(_delete_=True, embed_dims=8, depths=(1, 1, 1, 1))}
OPTIONS = {
    'RetinaNet': {**ARCH, 'model.neck.in_channels': [16, 32, 64]},
    'MaskRCNN': {
        **ARCH,
        'model.neck.in_channels': [8, 16, 32, 64],
        # A box and a mask for each class, as COCO's configs have them.
        'model.roi_head.bbox_head.reg_class_agnostic': False,
        'model.roi_head.mask_head.class_agnostic': False,
    },
    'CascadeRCNN': {
        **ARCH,
        'model.neck.in_channels': [8, 16, 32, 64],
        'model.neck.num_outs': 4,
        'model.rpn_head.anchor_generator.strides': [4, 8, 16, 32],
        'model.test_cfg.rpn.max_per_img': 20,
        'model.test_cfg.rcnn.max_per_img': 20,
        'model.roi_head.mask_head.num_classes': 10,
        'model.roi_head.mask_head.num_convs': 1,
        'model.roi_head.mask_head.conv_out_channels': 16,
        **{
            f'model.roi_head.bbox_head.{stage}.{key}': value
            for stage in range(3)
            for key, value in dict(num_classes=10, num_shared_convs=1, conv_out_channels=32, fc_out_channels=64).items()
        },
    },
}
ANY = dict(dynamic_batch=True, dynamic_size=True)
RESIZED = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(112, 80), keep_ratio=False)]
PADDED = {  # as whole models may not be
    'model.data_preprocessor.test_cfg': dict(size=(96, 96)),
    'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile'), dict(type='Pad', size=(96, 96))],
}
# A config, its options, how it is exported, and the names of classes in its checkpoint.
EXPORTS = {
    'classifier': (str(CONFIG), {}, dict(dynamic_batch=True), CLASSES),
    'classifier in openvino': (str(CONFIG), {}, dict(format='openvino', dynamic_batch=True, scores=True), CLASSES),
    'segmentor': (
        SCENES,
        {
            **STEMS,
            'test_dataloader.dataset.pipeline': [*RESIZED, dict(type='PackSegInputs')],
        },
        dict(ANY, format='openvino', shape=(80, 112)),
        list('abcdefghijk'),
    ),
    'maps': (SCENES, {**STEMS, **PADDED}, dict(ANY, part='backbone', shape=(80, 112)), None),
    'neck': (DETECTORS['RetinaNet'], OPTIONS['RetinaNet'], dict(part='neck', shape=(64, 96)), None),
}
PAD_VALUE = 1.0  # after normalization
SPREAD = {'cls.weight': 0.1, 'reg.weight': 0.1, 'logits.weight': 0.3}  # of weights with which heads find something
SIZES = {'RetinaNet': (64, 64), 'MaskRCNN': (64, 96), 'CascadeRCNN': (64, 64)}  # one as its windows, and larger


def build_model(config):
    init_default_scope(config.default_scope)
    return MODELS.build(config.model).eval()


def write_checkpoint(config, path, classes=None):
    model = randomise(build_model(config))
    meta = dict(dataset_meta=dict(classes=classes, palette=None)) if classes else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def write_detector(name: str, folder: Path) -> tuple[str, str]:
    """Config file and checkpoint of a detector that takes pictures of its size and finds something in any."""
    height, width = SIZES[name]
    config = load_config(DETECTORS[name], OPTIONS[name])
    config.model.data_preprocessor.pad_value = PAD_VALUE
    for step in config.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (width, height)
    config.dump(folder / 'config.py')
    torch.manual_seed(0)
    model = build_model(config)
    for key, value in model.named_parameters():
        for ending, std in SPREAD.items():
            if key.endswith(ending):
                torch.nn.init.normal_(value, std=std)
        if key.endswith('retina_cls.bias'):
            torch.nn.init.constant_(value, -2)
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'weights.pth')
    return str(folder / 'config.py'), str(folder / 'weights.pth')
