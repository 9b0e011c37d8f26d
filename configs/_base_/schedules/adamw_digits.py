optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0)
)

param_scheduler = [dict(type='OneCycleLR', eta_max=1e-3, by_epoch=True, total_steps=9, convert_to_iter_based=True)]

train_cfg = dict(by_epoch=True, max_epochs=9, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=64)
