# CIFAR-10 as JPEG files, data/cifar10_jpeg/{train,test}/CLASS/*.jpg, enlarged to 64 px, the size of the pretrained
# classifier. 45,000 training images are used for training, 5,000 for validation.
_base_ = ['./pipelines_224.py', './loaders_1core.py']

data_preprocessor = dict(num_classes=10)

enlarge = dict(type='Resize', scale=64, interpolation='bicubic')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    enlarge,
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), enlarge, dict(type='PackInputs')]

tta_pipeline = test_pipeline[:-1] + [_base_.flips]

for __step in train_pipeline + test_pipeline + tta_pipeline:
    __step['_scope_'] = 'mmpretrain'

dataset = dict(_scope_='mmpretrain', type='mmstrip.SplitFolder', data_root='data/cifar10_jpeg')
train_dataloader = dict(dataset=dict(split='train-part', pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='held-out', pipeline=test_pipeline, **dataset))
test_dataloader = dict(dataset=dict(split='test', pipeline=test_pipeline, **dataset))
