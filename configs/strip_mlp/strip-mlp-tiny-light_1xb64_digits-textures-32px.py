# The digits at any place, size and contrast on textures: a classifier whose weights serve detectors and segmentors.
_base_ = ['./strip-mlp-tiny-light_1xb64_digits-32px.py']

train_pipeline = [dict(type='mmstrip.PlaceDigit', size=32), dict(type='PackInputs')]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
