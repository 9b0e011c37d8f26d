_base_ = ['./dino-4scale_strip-mlp-tiny-light_8xb2-36e_coco.py']

model = dict(
    backbone=dict(arch='tiny', init_cfg=dict(checkpoint='checkpoints/strip-mlp-tiny_in1k.pth')),
)
