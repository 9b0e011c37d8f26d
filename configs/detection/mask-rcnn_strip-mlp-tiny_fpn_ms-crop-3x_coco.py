_base_ = ['./mask-rcnn_strip-mlp-tiny-light_fpn_ms-crop-3x_coco.py']

model = dict(
    backbone=dict(arch='tiny', init_cfg=dict(checkpoint='checkpoints/strip-mlp-tiny_in1k.pth')),
)
