# Caltech-101 for short trainings at 64 px. The images are resized once, because decoding large ones takes long:
# python tools/dataset_converters/caltech101.py data/caltech101 --smaller-copy data/caltech101_96px
# Four fifths of the training images are used for training, the rest for validation and choosing settings.
_base_ = ['./pipelines_224.py', './loaders_1core.py']

data_preprocessor = dict(num_classes=101)

# RandAugment, random erasing and mixup help only in longer trainings.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.2, 1.0), backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type='PackInputs'),
]

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=73, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='PackInputs'),
]

tta_pipeline = test_pipeline[:-1] + [_base_.flips]

for __step in train_pipeline + test_pipeline + tta_pipeline:
    __step['_scope_'] = 'mmpretrain'

dataset = dict(_scope_='mmpretrain', type='mmstrip.Caltech101', data_root='data/caltech101_96px')
train_dataloader = dict(batch_size=32, dataset=dict(split='train-part', pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='held-out', pipeline=test_pipeline, **dataset))
test_dataloader = dict(dataset=dict(split='test', pipeline=test_pipeline, **dataset))
