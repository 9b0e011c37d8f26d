# Datasets without a validation split: the last epoch counts, because the best one would be chosen on the test set.
_base_ = ['./default_runtime.py']

default_hooks = dict(checkpoint=dict(save_best=None))
