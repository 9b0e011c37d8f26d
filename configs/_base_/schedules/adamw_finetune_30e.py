# As many steps (12,000) on CIFAR, where 390 make an epoch.
_base_ = ['./adamw_finetune_100e.py']

train_cfg = dict(max_epochs=30)
