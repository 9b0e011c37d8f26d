_base_ = ['./strip-mlp-tiny-light_upernet_8xb2-160k_ade20k-512x512.py']

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/strip-mlp-small_in1k.pth')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
