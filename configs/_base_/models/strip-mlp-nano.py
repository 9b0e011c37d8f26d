# Not a variant of the paper: small enough to train on two CPU cores, for the digit scenes.
_base_ = ['./strip-mlp.py']

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=48, depths=(1, 1, 4, 1))),
    head=dict(in_channels=384),
)
