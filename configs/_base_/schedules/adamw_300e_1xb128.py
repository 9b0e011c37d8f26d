# The same for small datasets, as in the authors' command: one process with 128 images.
_base_ = ['./adamw_300e.py']

auto_scale_lr = dict(base_batch_size=128)
