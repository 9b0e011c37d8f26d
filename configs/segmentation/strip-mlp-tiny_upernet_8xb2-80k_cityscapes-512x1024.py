_base_ = ['./strip-mlp-tiny-light_upernet_8xb2-80k_cityscapes-512x1024.py']

model = dict(
    backbone=dict(arch='tiny', init_cfg=dict(checkpoint='checkpoints/strip-mlp-tiny_in1k.pth')),
)
