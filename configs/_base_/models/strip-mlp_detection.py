# The backbone and feature pyramid of all detectors.
strip_mlp = dict(
    type='mmstrip.StripMLP',
    arch='tiny-light',
    out_indices=(0, 1, 2, 3),
    norm_eval=True,  # BN statistics of two images per GPU are poor
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/strip-mlp-tiny-light_in1k.pth', prefix='backbone.'),
)
fpn = dict(type='FPN', in_channels=[80, 160, 320, 640], norm_cfg=dict(type='GN', num_groups=32))
