# Starts from the classifier trained by strip-mlp-tiny-light_1xb32_caltech101-64px.py; from scratch with
# --cfg-options model.backbone.init_cfg=None
_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/cifar10_jpeg_bs64_64.py',
    '../_base_/schedules/adamw_short.py',
    '../_base_/small_data_runtime.py',
]

checkpoint = 'work_dirs/strip-mlp-tiny-light_1xb32_caltech101-64px/epoch_12.pth'
init = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
model = dict(backbone=dict(img_size=64, drop_path_rate=0.0, init_cfg=init), head=dict(num_classes=10), train_cfg=None)

train_cfg = dict(max_epochs=2)

auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(logger=dict(interval=100), checkpoint=dict(max_keep_ckpts=1))

randomness = dict(seed=0)
