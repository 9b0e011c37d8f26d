# The authors' augmentation and test crop at 224 px. Their configuration also sets a color jitter of 0.4, but timm skips
# color jitter if RandAugment is on, so their training has none. Types of mmstrip compute the same as mmpretrain's, in
# half the time.
data_preprocessor = dict(num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

bgr_mean = data_preprocessor['mean'][::-1]
bgr_std = data_preprocessor['std'][::-1]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='mmstrip.RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='mmstrip.RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='mmstrip.RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[round(x) for x in bgr_mean], interpolation='bicubic'),
    ),
    dict(
        type='mmstrip.RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std,
    ),
    dict(type='mmstrip.ToPlanes'),
    dict(type='PackInputs'),
]

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]

# tools/test.py --tta: the image and its mirror image
tta_model = dict(_scope_='mmpretrain', type='AverageClsScoreTTA')
flips = dict(
    type='TestTimeAug', transforms=[[dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)], [dict(type='PackInputs')]]
)
tta_pipeline = test_pipeline[:-1] + [flips]

# mmengine would give types without a scope that of an inheriting project; these are mmpretrain's.
for __step in train_pipeline + test_pipeline + tta_pipeline:
    __step['_scope_'] = 'mmpretrain'
