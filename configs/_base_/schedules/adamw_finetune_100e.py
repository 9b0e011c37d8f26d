# Fine-tuning from an ImageNet-1K checkpoint on a few thousand images. A fifth of the learning rate from scratch
# preserves the pretrained features; 100 epochs of 57 to 127 steps are 6,000 to 13,000 steps.
_base_ = ['./adamw_300e_1xb128.py']

optim_wrapper = dict(optimizer=dict(lr=1e-4))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=5, convert_to_iter_based=True),
]

train_cfg = dict(max_epochs=100)
