# Scenes of scikit-learn's digits, 96 x 96 pixels: tools/dataset_converters/digit_scenes.py data/digit_scenes
dataset = dict(
    _scope_='mmseg',
    type='mmstrip.SegDataset',
    data_root='data/digit_scenes/',
    metainfo=dict(classes=('background', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9')),
    reduce_zero_label=False,
    img_suffix='.png',
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]

# tools/test.py --tta: three sizes; no mirror images, because they are other characters
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=factor, keep_ratio=True) for factor in (0.75, 1.0, 1.25)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]

# mmengine would give types without a scope that of an inheriting project; these are mmseg's.
for __step in train_pipeline + test_pipeline + tta_pipeline:
    __step['_scope_'] = 'mmseg'

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(data_prefix=dict(img_path='train', seg_map_path='labels/train'), pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='val', seg_map_path='labels/val'), test_mode=True, pipeline=test_pipeline, **dataset
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(_scope_='mmseg', type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
