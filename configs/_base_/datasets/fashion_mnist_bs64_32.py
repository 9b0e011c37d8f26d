# Fashion-MNIST, 28 x 28 pixels plus a margin of 2: python tools/dataset_converters/fashion_mnist.py data/fashion_mnist
# 55,000 training images are used for training, 5,000 for validation and choosing settings.
_base_ = ['./loaders_1core.py']

data_preprocessor = dict(num_classes=10, mean=[72.9] * 3, std=[90.0] * 3, to_rgb=False)

train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=0.25,
        fill_color=data_preprocessor['mean'],
        fill_std=data_preprocessor['std'],
    ),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='PackInputs')]

# tools/test.py --tta: the image and its mirror image
tta_model = dict(_scope_='mmpretrain', type='AverageClsScoreTTA')
flips = [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)]
tta_pipeline = [dict(type='TestTimeAug', transforms=[flips, [dict(type='PackInputs')]])]

# mmengine would give types without a scope that of an inheriting project; these are mmpretrain's.
for __step in train_pipeline + test_pipeline + tta_pipeline:
    __step['_scope_'] = 'mmpretrain'

dataset = dict(_scope_='mmpretrain', type='mmstrip.FashionMNIST', data_root='data/fashion_mnist')
train_dataloader = dict(dataset=dict(split='train-part', pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='held-out', pipeline=test_pipeline, **dataset))
test_dataloader = dict(dataset=dict(split='test', pipeline=test_pipeline, **dataset))
