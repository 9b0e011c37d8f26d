# 80 / 20 % of each class, without BACKGROUND_Google. To write the split to meta/:
# python tools/dataset_converters/caltech101.py data/caltech101
_base_ = ['./pipelines_224.py', './loaders_bs128.py']

data_preprocessor = dict(num_classes=101)

dataset = dict(_scope_='mmpretrain', type='mmstrip.Caltech101', data_root='data/caltech101')
train_dataloader = dict(dataset=dict(split='train', pipeline=_base_.train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='test', pipeline=_base_.test_pipeline, **dataset))
test_dataloader = val_dataloader
