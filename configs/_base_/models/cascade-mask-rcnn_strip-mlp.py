_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py']

# Heads of four convolutions and one linear layer, as in the Cascade Mask R-CNN of Swin and ConvNeXt.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmstrip.StripMLP',
        arch='tiny-light',
        out_indices=(0, 1, 2, 3),
        norm_eval=True,  # BN statistics of two images a GPU are poor
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth', prefix='backbone.'),
    ),
    neck=dict(in_channels=[80, 160, 320, 640], norm_cfg=dict(type='GN', num_groups=32)),
    roi_head=dict(
        bbox_head=[
            dict(
                type='ConvFCBBoxHead',
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder', target_stds=[0.1 / step, 0.1 / step, 0.2 / step, 0.2 / step]
                ),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for step in (1, 2, 3)
        ]
    ),
)
