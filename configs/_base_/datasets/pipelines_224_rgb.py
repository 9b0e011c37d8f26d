# The same for datasets that give RGB arrays: nothing to load, fill colors in RGB order.
_base_ = ['./pipelines_224.py']

data_preprocessor = dict(to_rgb=False)

train_pipeline = _base_.train_pipeline[1:]
train_pipeline[2].hparams.pad_val.reverse()
train_pipeline[3].fill_color.reverse()
train_pipeline[3].fill_std.reverse()

test_pipeline = _base_.test_pipeline[1:]
tta_pipeline = test_pipeline[:-1] + [_base_.flips]
