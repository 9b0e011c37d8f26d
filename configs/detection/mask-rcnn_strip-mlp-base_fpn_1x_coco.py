_base_ = ['./mask-rcnn_strip-mlp-tiny-light_fpn_1x_coco.py']

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='checkpoints/strip-mlp-base_in1k.pth')),
    neck=dict(in_channels=[112, 224, 448, 896]),
)
