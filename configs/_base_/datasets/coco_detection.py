# COCO at 1333 x 800, as in mmdet.
_base_ = ['mmdet::_base_/datasets/coco_detection.py']

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
