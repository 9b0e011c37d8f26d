_base_ = [
    '../_base_/models/mask-rcnn_strip-mlp.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/adamw_digit_scenes.py',
    '../_base_/det_runtime.py',
]

# Small heads with BN after convolutions; anchors and mask sizes for digits of 10 to 60 pixels.
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(mean=[77.9] * 3, std=[95.9] * 3),  # same as the digits classifier
    backbone=dict(
        _delete_=True,
        type='mmstrip.StripMLP',
        arch=dict(embed_dims=48, depths=(1, 1, 4, 1)),
        img_size=64,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[48, 96, 192, 384], out_channels=64, num_outs=4, norm_cfg=dict(norm_cfg, _delete_=True)),
    rpn_head=dict(
        in_channels=64, feat_channels=64, anchor_generator=dict(scales=[2.5], ratios=[1.0, 2.0], strides=[4, 8, 16, 32])
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=[4, 8, 16], finest_scale=28),
        bbox_head=dict(
            type='ConvFCBBoxHead',
            num_shared_convs=1,
            num_shared_fcs=1,
            norm_cfg=norm_cfg,
            conv_out_channels=64,
            in_channels=64,
            fc_out_channels=256,
            num_classes=10,
            reg_class_agnostic=True,
        ),
        mask_roi_extractor=dict(out_channels=64, featmap_strides=[4, 8, 16], finest_scale=28),
        mask_head=dict(
            num_convs=2, norm_cfg=norm_cfg, in_channels=64, conv_out_channels=48, num_classes=10, class_agnostic=True
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100), rcnn=dict(max_per_img=30)),
)

val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best=None, max_keep_ckpts=1))

randomness = dict(seed=0)
