_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/fashion_mnist_bs64_32.py',
    '../_base_/schedules/adamw_short.py',
    '../_base_/small_data_runtime.py',
]

model = dict(backbone=dict(img_size=32, drop_path_rate=0.1), head=dict(num_classes=10), train_cfg=None)

train_cfg = dict(max_epochs=12)

auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(logger=dict(interval=100), checkpoint=dict(max_keep_ckpts=1))

randomness = dict(seed=0)
