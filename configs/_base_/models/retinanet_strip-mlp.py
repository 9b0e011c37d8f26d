_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './strip-mlp_detection.py']

model = dict(
    backbone=dict(_base_.strip_mlp, _delete_=True, out_indices=(1, 2, 3)),
    neck=dict(_base_.fpn, in_channels=[160, 320, 640], start_level=0),
)
