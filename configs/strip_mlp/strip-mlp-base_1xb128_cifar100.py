_base_ = ['./strip-mlp-tiny-light_1xb128_cifar100.py']

model = dict(backbone=dict(arch='base'), head=dict(in_channels=896))
