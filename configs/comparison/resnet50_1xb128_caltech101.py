_base_ = ['../strip_mlp/strip-mlp-tiny-light_1xb128_caltech101.py']

model = dict(backbone=dict(_delete_=True, type='mmpretrain.ResNet', depth=50), head=dict(in_channels=2048))
