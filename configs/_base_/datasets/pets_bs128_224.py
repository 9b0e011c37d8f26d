_base_ = ['./pipelines_224.py', './loaders_bs128.py']

data_preprocessor = dict(num_classes=37)

dataset = dict(_scope_='mmpretrain', type='OxfordIIITPet', data_root='data/pets')
train_dataloader = dict(dataset=dict(split='trainval', pipeline=_base_.train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='test', pipeline=_base_.test_pipeline, **dataset))
test_dataloader = val_dataloader
