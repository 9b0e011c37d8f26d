# Datasets without a validation split: choosing the best epoch would choose on the test images, so the last one counts.
_base_ = ['./default_runtime.py']

default_hooks = dict(checkpoint=dict(save_best=None))
