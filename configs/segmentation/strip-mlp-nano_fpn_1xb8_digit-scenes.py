_base_ = [
    '../_base_/models/semantic-fpn_strip-mlp.py',
    '../_base_/datasets/digit_scenes_segmentation.py',
    '../_base_/schedules/adamw_digit_scenes.py',
    '../_base_/seg_runtime.py',
]

norm_cfg = dict(type='BN')
data_preprocessor = dict(mean=[77.9] * 3, std=[95.9] * 3, size=(96, 96))  # same as the digits classifier
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type='mmstrip.StripMLP',
        arch=dict(embed_dims=48, depths=(1, 1, 4, 1)),
        img_size=64,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[48, 96, 192, 384], out_channels=64, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=[64] * 4,
        channels=64,
        num_classes=11,
        norm_cfg=norm_cfg,
        # Four fifths of the pixels are background; at full weight, the model takes long to distinguish the digits.
        loss_decode=dict(class_weight=[0.2] + [1.0] * 10),
    ),
)

optim_wrapper = dict(optimizer=dict(lr=1e-3))

default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1, save_best=None, max_keep_ckpts=1),
)

log_processor = dict(by_epoch=True)

randomness = dict(seed=0)
