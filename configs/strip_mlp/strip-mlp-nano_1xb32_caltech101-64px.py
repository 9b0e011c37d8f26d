# Small enough for many trainings. As in the paper, there are a quarter as many channel patches as channels.
_base_ = ['./strip-mlp-tiny-light_1xb32_caltech101-64px.py']

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=48, depths=(1, 1, 4, 1)), num_patches=(12, 24, 48, 96)),
    head=dict(in_channels=384),
)
