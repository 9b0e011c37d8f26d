# Enlarged images give one token per original pixel, in a network with few channels.
_base_ = ['./strip-mlp-tiny-light_1xb64_fashion-mnist-32px.py']

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depths=(1, 2, 2, 1)), img_size=128, drop_path_rate=0.05),
    head=dict(in_channels=256),
)

enlarge = dict(_scope_='mmpretrain', type='Resize', scale=128, interpolation='bicubic')
train_pipeline = [*_base_.train_pipeline[:-1], enlarge, _base_.train_pipeline[-1]]
test_pipeline = [enlarge, *_base_.test_pipeline]
tta_pipeline = [enlarge, *_base_.tta_pipeline]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

optim_wrapper = dict(optimizer=dict(lr=2e-3))

train_cfg = dict(max_epochs=32)
