_base_ = ['./strip-mlp.py']

model = dict(backbone=dict(arch='tiny-light'), head=dict(in_channels=640))
