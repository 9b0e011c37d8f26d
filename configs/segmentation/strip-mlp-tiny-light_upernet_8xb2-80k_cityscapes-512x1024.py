_base_ = [
    '../_base_/models/upernet_strip-mlp.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/schedules/adamw_seg_80k.py',
    '../_base_/seg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    test_cfg=dict(mode='slide', crop_size=(512, 1024), stride=(341, 683)),
)
