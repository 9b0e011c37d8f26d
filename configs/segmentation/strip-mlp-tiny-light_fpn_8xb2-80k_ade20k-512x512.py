_base_ = [
    '../_base_/models/semantic-fpn_strip-mlp.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_seg_80k.py',
    '../_base_/seg_runtime.py',
]

model = dict(data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150))

# As for Semantic FPN with other backbones and AdamW (PVT, PoolFormer): 1e-4 at 16 images per step.
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
