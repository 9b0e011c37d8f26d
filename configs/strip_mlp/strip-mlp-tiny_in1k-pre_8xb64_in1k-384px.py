_base_ = ['./strip-mlp-tiny-light_in1k-pre_8xb64_in1k-384px.py']

model = dict(backbone=dict(arch='tiny'), init_cfg=dict(checkpoint='checkpoints/strip-mlp-tiny_in1k.pth'))
