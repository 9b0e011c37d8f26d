_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']

# ATSS: RetinaNet's towers with one anchor a place, samples chosen by statistics, and a centre-ness branch.
model = dict(
    type='ATSS',
    backbone=dict(
        _delete_=True,
        type='mmstrip.StripMLP',
        arch='tiny-light',
        out_indices=(1, 2, 3),
        norm_eval=True,  # BN statistics of two images a GPU are poor
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth', prefix='backbone.'),
    ),
    neck=dict(
        in_channels=[160, 320, 640],
        start_level=0,
        add_extra_convs='on_output',
        norm_cfg=dict(type='GN', num_groups=32),
    ),
    bbox_head=dict(
        type='ATSSHead',
        anchor_generator=dict(
            _delete_=True,
            type='AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_bbox=dict(_delete_=True, type='GIoULoss', loss_weight=2.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
    train_cfg=dict(assigner=dict(_delete_=True, type='ATSSAssigner', topk=9), sampler=None),
    test_cfg=dict(nms=dict(iou_threshold=0.6)),
)
