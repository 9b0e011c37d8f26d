_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/digits_bs64_32.py',
    '../_base_/schedules/adamw_digits.py',
    '../_base_/default_runtime.py',
]

# Mixup and CutMix make a short training on digits longer, not better.
model = dict(backbone=dict(img_size=32), head=dict(num_classes=10), train_cfg=None)

default_hooks = dict(logger=dict(interval=5), checkpoint=dict(save_best=None, max_keep_ckpts=1))

randomness = dict(seed=0)
