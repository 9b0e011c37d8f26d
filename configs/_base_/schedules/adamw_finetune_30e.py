# About as many steps (12,000) on CIFAR, with 390 steps per epoch.
_base_ = ['./adamw_finetune_100e.py']

train_cfg = dict(max_epochs=30)
