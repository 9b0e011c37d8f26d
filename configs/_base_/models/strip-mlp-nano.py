# Not one of the paper's variants: small enough to train on two CPU cores, for the scenes of digits.
_base_ = ['./strip-mlp.py']

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=48, depths=(1, 1, 4, 1))),
    head=dict(in_channels=384),
)
