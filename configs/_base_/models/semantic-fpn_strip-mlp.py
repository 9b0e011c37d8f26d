_base_ = ['./segmentor_strip-mlp.py']

# mmseg's settings.
model = dict(
    neck=dict(type='FPN', in_channels=[80, 160, 320, 640], out_channels=256, num_outs=4),
    decode_head=dict(type='FPNHead', in_channels=[256] * 4, feature_strides=[4, 8, 16, 32], channels=128),
)
