_base_ = [
    '../_base_/models/strip-mlp-tiny-light.py',
    '../_base_/datasets/caltech101_bs128_224.py',
    '../_base_/schedules/adamw_300e_1xb128.py',
    '../_base_/small_data_runtime.py',
]

model = dict(head=dict(num_classes=101))
