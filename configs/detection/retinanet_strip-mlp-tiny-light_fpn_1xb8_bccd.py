# Starts from the classifier trained by strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py; from scratch with
# --cfg-options model.backbone.init_cfg=None
_base_ = [
    '../_base_/models/retinanet_strip-mlp.py',
    '../_base_/datasets/bccd_bs8_320.py',
    '../_base_/schedules/adamw_short_dense.py',
    '../_base_/det_runtime.py',
]

# A small head with norms, which learns in a few hundred steps; anchors for cells of 10 to 100 pixels.
norm_cfg = dict(type='GN', num_groups=16)
checkpoint = 'work_dirs/strip-mlp-tiny-light_1xb32_caltech101-64px/epoch_12.pth'
init = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
model = dict(
    backbone=dict(img_size=64, drop_path_rate=0.0, norm_eval=False, init_cfg=init),
    neck=dict(out_channels=128, num_outs=3, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=3,
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
)

# 25 steps per epoch.
train_cfg = dict(val_interval=3)
param_scheduler = [dict(_base_.param_scheduler[0], end=50), _base_.param_scheduler[1]]

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best=None, max_keep_ckpts=1))
custom_hooks = [dict(type='SyncBuffersHook'), dict(type='mmstrip.TrainingCurvesHook')]

randomness = dict(seed=0)
