_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', './strip-mlp_detection.py']

# Heads of four convolutions and one linear layer, as in the Cascade Mask R-CNN of Swin and ConvNeXt.
model = dict(
    backbone=dict(_base_.strip_mlp, _delete_=True),
    neck=_base_.fpn,
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
