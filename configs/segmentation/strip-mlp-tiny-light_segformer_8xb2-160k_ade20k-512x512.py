_base_ = [
    '../_base_/models/segformer_strip-mlp.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_seg_160k.py',
    '../_base_/seg_runtime.py',
]

model = dict(data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150))
