_base_ = ['./segmentor_strip-mlp.py']

# The all-MLP head of SegFormer.
model = dict(decode_head=dict(type='SegformerHead', channels=256))
