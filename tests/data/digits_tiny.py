# The digits demo for tests that start it many times, with all that draws random numbers or keeps a state.
_base_ = ['./digits_small.py']

model = dict(
    backbone=dict(arch=dict(embed_dims=16, depths=(1, 1, 1, 1)), drop_path_rate=0.2),
    head=dict(in_channels=128),
    train_cfg=dict(_delete_=True, augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
train_dataloader = dict(batch_size=8, num_workers=1, persistent_workers=True, dataset=dict(indices=30))
val_dataloader = dict(dataset=dict(indices=10))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=4)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=2, save_best='auto'))
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
randomness = dict(_delete_=True, seed=None)
