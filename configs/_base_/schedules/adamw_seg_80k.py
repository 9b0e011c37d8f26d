# The 160k recipe with 80,000 iterations.
_base_ = ['./adamw_seg_160k.py']

param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=80000)]

train_cfg = dict(max_iters=80000, val_interval=8000)
