# The digits demo with a network small enough for tests.
_base_ = ['../../configs/strip_mlp/strip-mlp-tiny-light_1xb64_digits-32px.py']

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depths=(1, 1, 2, 1)), drop_path_rate=0.0),
    head=dict(in_channels=256),
)

train_cfg = dict(max_epochs=4)
param_scheduler = [dict(type='OneCycleLR', eta_max=3e-3, by_epoch=True, total_steps=4, convert_to_iter_based=True)]
optim_wrapper = dict(optimizer=dict(lr=3e-3))
