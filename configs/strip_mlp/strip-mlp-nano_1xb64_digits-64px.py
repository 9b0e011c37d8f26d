# Digits at any place, size and contrast on textures, to pretrain detectors and segmentors of digit scenes.
_base_ = [
    '../_base_/models/strip-mlp-nano.py',
    '../_base_/datasets/digits_bs64_32.py',
    '../_base_/schedules/adamw_digits.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(img_size=64, drop_path_rate=0.0), head=dict(num_classes=10), train_cfg=None)

train_pipeline = [dict(type='mmstrip.PlaceDigit', size=64), dict(type='PackInputs')]
test_pipeline = [dict(type='Resize', scale=64, interpolation='bicubic'), dict(type='PackInputs')]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

enlarged = [dict(type='Resize', scale=64, interpolation=how) for how in ('bicubic', 'bilinear')]
tta_pipeline = [dict(type='TestTimeAug', transforms=[enlarged, [dict(type='PackInputs')]])]

for __step in train_pipeline + test_pipeline + tta_pipeline:
    __step['_scope_'] = 'mmpretrain'

param_scheduler = [dict(type='OneCycleLR', eta_max=2e-3, by_epoch=True, total_steps=12, convert_to_iter_based=True)]

train_cfg = dict(max_epochs=12, val_interval=4)

default_hooks = dict(logger=dict(interval=5), checkpoint=dict(save_best=None, max_keep_ckpts=1))

randomness = dict(seed=0)
