# 80 / 20 % of each class, without BACKGROUND_Google; meta/ is written by
# tools/dataset_converters/caltech101.py data/caltech101
_base_ = ['./pipelines_224.py']

data_preprocessor = dict(num_classes=101)

dataset = dict(
    type='CustomDataset',
    data_root='data/caltech101',
    data_prefix='101_ObjectCategories',
    classes='data/caltech101/meta/classes.txt',
)

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(ann_file='meta/train.txt', pipeline=_base_.train_pipeline, **dataset),
    sampler=dict(type='DefaultSampler', shuffle=True),
)

val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    dataset=dict(ann_file='meta/test.txt', pipeline=_base_.test_pipeline, **dataset),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
