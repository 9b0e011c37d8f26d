_base_ = ['./strip-mlp-tiny-light_in1k-pre_1xb128_cifar10.py']

init = dict(checkpoint='checkpoints/strip-mlp-tiny_in1k.pth')
model = dict(backbone=dict(arch='tiny', init_cfg=init))
