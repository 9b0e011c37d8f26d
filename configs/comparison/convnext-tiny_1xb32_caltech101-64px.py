_base_ = ['../strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py']

# ConvNeXt pools before its last norm, in the backbone.
model = dict(
    backbone=dict(_delete_=True, type='mmpretrain.ConvNeXt', arch='tiny', drop_path_rate=0.0),
    neck=None,
    head=dict(in_channels=768),
)

# 20 % faster on CPUs.
custom_hooks = [*_base_.custom_hooks, dict(type='mmstrip.ChannelsLastHook')]
