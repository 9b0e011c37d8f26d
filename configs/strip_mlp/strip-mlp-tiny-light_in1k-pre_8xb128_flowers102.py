_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/flowers102_bs128_224.py',
    '../_base_/schedules/adamw_finetune.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth', prefix='backbone.')
    ),
    head=dict(num_classes=102),
)
