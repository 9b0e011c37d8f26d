_base_ = [
    '../_base_/models/strip-mlp-tiny.py',
    '../_base_/datasets/caltech101_bs128_224.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=101))
