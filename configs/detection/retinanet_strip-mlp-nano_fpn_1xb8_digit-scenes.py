_base_ = [
    '../_base_/models/retinanet_strip-mlp.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/adamw_digit_scenes.py',
    '../_base_/det_runtime.py',
]

# Small heads with BN, which learn in a few hundred steps, and anchors for digits of 10 to 60 pixels.
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(mean=[77.9] * 3, std=[95.9] * 3),  # same as the digits classifier
    backbone=dict(
        _delete_=True,
        type='mmstrip.StripMLP',
        arch=dict(embed_dims=48, depths=(1, 1, 4, 1)),
        img_size=64,
        drop_path_rate=0.0,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[96, 192, 384], out_channels=64, num_outs=3, norm_cfg=dict(norm_cfg, _delete_=True)),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=1.25, strides=[8, 16, 32]),
    ),
)

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best=None, max_keep_ckpts=1))

randomness = dict(seed=0)
