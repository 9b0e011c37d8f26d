_base_ = ['./strip-mlp.py']

model = dict(backbone=dict(arch='base'), head=dict(in_channels=896))
