# The network of the ablations: small enough for dozens of trainings, at 64 px so that the last map has 2 x 2 tokens.
# As in the paper, there are a quarter as many channel patches as channels.
_base_ = [
    '../_base_/models/strip-mlp.py',
    '../_base_/datasets/cifar10_jpeg_bs64_64.py',
    '../_base_/schedules/adamw_short.py',
    '../_base_/small_data_runtime.py',
]

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(1, 2, 2, 1)),
        img_size=64,
        drop_path_rate=0.0,
        num_patches=(8, 16, 32, 64),
    ),
    head=dict(in_channels=256, num_classes=10),
    train_cfg=None,
)

train_dataloader = dict(batch_size=128)

optim_wrapper = dict(optimizer=dict(lr=2e-3))

train_cfg = dict(max_epochs=5)

auto_scale_lr = dict(base_batch_size=128)

default_hooks = dict(logger=dict(interval=100), checkpoint=dict(max_keep_ckpts=1), visualization=dict(rescale_factor=4))

randomness = dict(seed=0)
