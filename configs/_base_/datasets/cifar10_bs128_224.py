_base_ = ['./pipelines_224_rgb.py', './loaders_bs128.py']

data_preprocessor = dict(num_classes=10)

dataset = dict(_scope_='mmpretrain', type='CIFAR10', data_root='data/cifar10')
train_dataloader = dict(dataset=dict(split='train', pipeline=_base_.train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='test', pipeline=_base_.test_pipeline, **dataset))
test_dataloader = val_dataloader
