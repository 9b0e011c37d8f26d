# mmdet's DINO on strides 8, 16 and 32, with frozen BN, as in MLP-DINO's config (IJCAI 2024), whose code trains BN.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', '../_base_/models/strip-mlp_detection.py']

model = dict(
    backbone=dict(
        _base_.strip_mlp, _delete_=True, out_indices=(1, 2, 3), norm_cfg=dict(type='BN', requires_grad=False)
    ),
    neck=dict(in_channels=[160, 320, 640]),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    *_base_.train_pipeline[1:-1],
    dict(type='mmstrip.ToPlanes'),
    _base_.train_pipeline[-1],
]
test_pipeline = [dict(type='LoadImageFromFile'), *_base_.test_pipeline[1:]]
# mmengine would give types without a scope that of an inheriting project; these are mmdet's.
for __step in train_pipeline + test_pipeline:
    __step['_scope_'] = 'mmdet'

train_dataloader = dict(dataset=dict(type='mmstrip.CocoDataset', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type='mmstrip.CocoDataset', pipeline=test_pipeline))
test_dataloader = val_dataloader

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))

custom_hooks = [dict(type='mmstrip.TrainingCurvesHook', metrics=['coco/bbox_mAP', 'coco/bbox_mAP_50'])]
