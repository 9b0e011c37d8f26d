_base_ = ['./strip-mlp.py']

model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
