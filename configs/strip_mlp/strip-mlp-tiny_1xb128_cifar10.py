_base_ = ['./strip-mlp-tiny-light_1xb128_cifar10.py']

model = dict(backbone=dict(arch='tiny'))
