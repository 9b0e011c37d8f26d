_base_ = ['./strip-mlp-tiny-light_upernet_8xb2-160k_ade20k-512x512.py']

model = dict(
    backbone=dict(arch='tiny', init_cfg=dict(checkpoint='checkpoints/strip-mlp-tiny_in1k.pth')),
)
