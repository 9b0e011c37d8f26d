_base_ = ['./strip-mlp-tiny-light_1xb128_caltech101.py']

model = dict(backbone=dict(arch='tiny'))
