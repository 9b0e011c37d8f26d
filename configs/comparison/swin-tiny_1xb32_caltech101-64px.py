_base_ = ['../strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py']

# Windows that tile maps of 16, 8, 4 and 2 tokens; windows of 7 tokens would be mostly padding, at twice the cost.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformer',
        arch='tiny',
        img_size=64,
        stage_cfgs=[dict(block_cfgs=dict(window_size=size)) for size in (8, 8, 4, 2)],
        drop_path_rate=0.0,
    ),
    head=dict(in_channels=768),
)
