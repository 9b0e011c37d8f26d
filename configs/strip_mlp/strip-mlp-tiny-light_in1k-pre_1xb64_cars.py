_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/cars_bs128_224.py',
    '../_base_/schedules/adamw_finetune_100e.py',
    '../_base_/small_data_runtime.py',
]

init = dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth', prefix='backbone.')
model = dict(backbone=dict(init_cfg=init), head=dict(num_classes=196))

train_dataloader = dict(batch_size=64)

auto_scale_lr = dict(base_batch_size=64)
