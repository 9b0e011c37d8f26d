_base_ = ['./strip-mlp-tiny-light_upernet_8xb2-160k_ade20k-512x512.py']

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='checkpoints/strip-mlp-base_in1k.pth')),
    decode_head=dict(in_channels=[112, 224, 448, 896]),
    auxiliary_head=dict(in_channels=448),
)
