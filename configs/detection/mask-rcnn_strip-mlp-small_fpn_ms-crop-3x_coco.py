_base_ = ['./mask-rcnn_strip-mlp-tiny-light_fpn_ms-crop-3x_coco.py']

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/strip-mlp-small_in1k.pth')),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
