_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/imagenet_bs64_384.py',
    '../_base_/schedules/adamw_finetune_384.py',
    '../_base_/default_runtime.py',
]

# Strip weights and position tables are resampled to 384 px on loading; the head comes with the checkpoint.
model = dict(
    backbone=dict(img_size=384),
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth'),
)
