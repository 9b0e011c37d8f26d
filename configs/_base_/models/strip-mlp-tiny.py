_base_ = ['./strip-mlp.py']

model = dict(backbone=dict(arch='tiny'), head=dict(in_channels=640))
