_base_ = ['./strip-mlp-tiny-light_8xb128_in1k.py']

model = dict(backbone=dict(arch='base'), head=dict(in_channels=896))
