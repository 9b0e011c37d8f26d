# 160,000 iterations, as in Swin.
_base_ = ['./adamw_dense.py']

optim_wrapper = dict(optimizer=dict(lr=6e-5, weight_decay=0.01))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=16)
