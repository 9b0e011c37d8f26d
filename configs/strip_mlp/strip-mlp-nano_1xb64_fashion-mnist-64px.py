# Enlarged images give four times as many tokens; a network with a fifth of the parameters takes the same time.
_base_ = ['./strip-mlp-tiny-light_1xb64_fashion-mnist-32px.py']

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=48, depths=(1, 1, 4, 1)), img_size=64), head=dict(in_channels=384)
)

enlarge = dict(_scope_='mmpretrain', type='Resize', scale=64, interpolation='bicubic')
train_pipeline = [*_base_.train_pipeline[:-1], enlarge, _base_.train_pipeline[-1]]
test_pipeline = [enlarge, *_base_.test_pipeline]
tta_pipeline = [enlarge, *_base_.tta_pipeline]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
