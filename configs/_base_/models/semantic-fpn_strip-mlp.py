_base_ = ['mmseg::_base_/models/fpn_r50.py']

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmstrip.StripMLP',
        arch='tiny-light',
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth', prefix='backbone.'),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
