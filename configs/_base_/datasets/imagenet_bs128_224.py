_base_ = ['./pipelines_224.py', './loaders_bs128.py']

data_preprocessor = dict(num_classes=1000)

dataset = dict(_scope_='mmpretrain', type='ImageNet', data_root='data/imagenet')
train_dataloader = dict(dataset=dict(split='train', pipeline=_base_.train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='val', pipeline=_base_.test_pipeline, **dataset))
test_dataloader = val_dataloader
