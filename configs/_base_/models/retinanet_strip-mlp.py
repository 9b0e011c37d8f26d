_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmstrip.StripMLP',
        arch='tiny-light',
        out_indices=(1, 2, 3),
        norm_eval=True,  # BN statistics of two images a GPU are poor
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth', prefix='backbone.'),
    ),
    neck=dict(in_channels=[160, 320, 640], start_level=0, norm_cfg=dict(type='GN', num_groups=32)),
)
