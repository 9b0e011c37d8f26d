# scikit-learn's handwritten digits, enlarged from 8 x 8 to 32 x 32 pixels.
data_preprocessor = dict(num_classes=10, mean=[77.9] * 3, std=[95.9] * 3, to_rgb=False)

train_pipeline = [
    dict(type='Resize', scale=32, interpolation='bicubic'),
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='Resize', scale=32, interpolation='bicubic'),
    dict(type='PackInputs'),
]

# tools/test.py --tta: two interpolations; no mirror image, because it is another character
tta_model = dict(_scope_='mmpretrain', type='AverageClsScoreTTA')
tta_pipeline = [
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=32, interpolation=how) for how in ('bicubic', 'bilinear')],
            [dict(type='PackInputs')],
        ],
    )
]

# mmengine would give types without a scope that of an inheriting project; these are mmpretrain's.
for __step in train_pipeline + test_pipeline + tta_pipeline:
    __step['_scope_'] = 'mmpretrain'

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,  # which mmpretrain's own tool would set
    drop_last=True,
    dataset=dict(_scope_='mmpretrain', type='mmstrip.Digits', split='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)

val_dataloader = dict(
    batch_size=120,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(_scope_='mmpretrain', type='mmstrip.Digits', split='test', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(_scope_='mmpretrain', type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
