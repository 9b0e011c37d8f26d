_base_ = ['./retinanet_strip-mlp-tiny-light_fpn_1x_coco.py']

model = dict(
    backbone=dict(arch='tiny', init_cfg=dict(checkpoint='checkpoints/strip-mlp-tiny_in1k.pth')),
)
