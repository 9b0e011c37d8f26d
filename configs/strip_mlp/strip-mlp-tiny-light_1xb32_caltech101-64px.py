_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/caltech101_bs32_64.py',
    '../_base_/schedules/adamw_short.py',
    '../_base_/small_data_runtime.py',
]

# Neither mixup and CutMix nor drop path help in so few epochs.
model = dict(backbone=dict(img_size=64, drop_path_rate=0.0), head=dict(num_classes=101), train_cfg=None)

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))

randomness = dict(seed=0)
