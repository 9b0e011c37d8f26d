# The weights in demo/: digits that fill the image or lie anywhere in it, bright on dark or dark on bright.
_base_ = ['./strip-mlp-nano_1xb64_digits-64px.py']

model = dict(backbone=dict(arch=dict(_delete_=True, embed_dims=32, depths=(1, 2, 2, 1))), head=dict(in_channels=256))

place, pack = _base_.train_pipeline
enlarge = [_base_.test_pipeline[0], dict(_scope_='mmpretrain', type='RandomCrop', crop_size=64, padding=8)]
train_pipeline = [
    dict(_scope_='mmpretrain', type='RandomChoice', transforms=[[place], enlarge]),
    dict(_scope_='mmpretrain', type='Invert', prob=0.5),
    pack,
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

param_scheduler = [dict(type='OneCycleLR', eta_max=3e-3, by_epoch=True, total_steps=60, convert_to_iter_based=True)]

train_cfg = dict(max_epochs=60, val_interval=10)
