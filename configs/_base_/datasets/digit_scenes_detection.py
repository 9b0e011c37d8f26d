# Scenes of scikit-learn's digits, 96 x 96 pixels: tools/dataset_converters/digit_scenes.py data/digit_scenes
dataset = dict(
    _scope_='mmdet',
    type='mmstrip.CocoDataset',
    data_root='data/digit_scenes/',
    metainfo=dict(classes=('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

# mmengine would give types without a scope that of an inheriting project; these are mmdet's.
for __step in train_pipeline + test_pipeline:
    __step['_scope_'] = 'mmdet'

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(ann_file='annotations/train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    _scope_='mmdet', type='CocoMetric', ann_file='data/digit_scenes/annotations/val.json', metric='bbox'
)
test_evaluator = val_evaluator
