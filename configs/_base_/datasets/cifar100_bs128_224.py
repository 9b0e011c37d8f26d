_base_ = ['./pipelines_224_rgb.py', './loaders_bs128.py']

data_preprocessor = dict(num_classes=100)

dataset = dict(_scope_='mmpretrain', type='CIFAR100', data_root='data/cifar100')
train_dataloader = dict(dataset=dict(split='train', pipeline=_base_.train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='test', pipeline=_base_.test_pipeline, **dataset))
test_dataloader = val_dataloader
