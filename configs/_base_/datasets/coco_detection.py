# COCO at 1333 x 800.
_base_ = ['mmdet::_base_/datasets/coco_detection.py']

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

# Where another project inherits this, mmengine gives its own scope to what has none; these types are mmdet's.
for __step in train_pipeline + test_pipeline:
    __step['_scope_'] = 'mmdet'

train_dataloader = dict(dataset=dict(type='mmstrip.CocoDataset', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type='mmstrip.CocoDataset', pipeline=test_pipeline))
test_dataloader = val_dataloader
