# Short trainings of detectors and segmentors, the same for all compared backbones.
_base_ = ['./adamw_short.py']

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.table': dict(decay_mult=0.0)}))

train_cfg = dict(val_interval=2)

auto_scale_lr = dict(base_batch_size=8)
