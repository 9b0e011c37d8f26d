# 80 / 20 % of each class, without BACKGROUND_Google; meta/ is written by
# tools/dataset_converters/caltech101.py data/caltech101
_base_ = ['./pipelines_224.py', './loaders_bs128.py']

data_preprocessor = dict(num_classes=101)

dataset = dict(
    type='CustomDataset',
    data_root='data/caltech101',
    data_prefix='101_ObjectCategories',
    classes='data/caltech101/meta/classes.txt',
)
train_dataloader = dict(dataset=dict(ann_file='meta/train.txt', pipeline=_base_.train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(ann_file='meta/test.txt', pipeline=_base_.test_pipeline, **dataset))
test_dataloader = val_dataloader
