_base_ = ['../strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformer',
        arch='tiny',
        img_size=64,
        pad_small_map=True,  # the last map is smaller than a window
        drop_path_rate=0.0,
    ),
    head=dict(in_channels=768),
)
