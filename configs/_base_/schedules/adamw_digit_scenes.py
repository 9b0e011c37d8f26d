# Short enough for two CPU cores.
_base_ = ['./adamw_digits.py']

param_scheduler = [dict(type='OneCycleLR', eta_max=1e-3, by_epoch=True, total_steps=4, convert_to_iter_based=True)]

train_cfg = dict(max_epochs=4, val_interval=1)

auto_scale_lr = dict(base_batch_size=8)
