_base_ = ['../segmentation/strip-mlp-tiny-light_fpn_1xb4_camvid.py']

init = dict(type='Pretrained', checkpoint='work_dirs/resnet18_1xb32_caltech101-64px/epoch_12.pth', prefix='backbone.')
model = dict(
    backbone=dict(_delete_=True, type='mmpretrain.ResNet', depth=18, out_indices=(0, 1, 2, 3), init_cfg=init),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
