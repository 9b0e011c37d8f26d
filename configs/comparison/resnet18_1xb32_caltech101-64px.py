_base_ = ['../strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py']

model = dict(backbone=dict(_delete_=True, type='mmpretrain.ResNet', depth=18), head=dict(in_channels=512))
