# Your own images; tools/misc/own_data.py writes configs that set their folder.
_base_ = ['./pipelines_224.py', './loaders_bs128.py']

dataset = dict(_scope_='mmpretrain', type='CustomDataset')
train_dataloader = dict(batch_size=64, num_workers=4, dataset=dict(pipeline=_base_.train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=64, num_workers=4, dataset=dict(pipeline=_base_.test_pipeline, test_mode=True, **dataset)
)
test_dataloader = val_dataloader
