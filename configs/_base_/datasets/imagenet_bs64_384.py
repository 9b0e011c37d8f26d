_base_ = ['./imagenet_bs128_224.py']

train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 384

# The whole image at the training size, as usual for fine-tuning at a larger size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=384, backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
tta_pipeline = test_pipeline[:-1] + [_base_.flips]

# mmengine would give types without a scope that of an inheriting project; these are mmpretrain's.
for __step in test_pipeline:
    __step['_scope_'] = 'mmpretrain'

train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
