_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', './strip-mlp_detection.py']

model = dict(backbone=dict(_base_.strip_mlp, _delete_=True), neck=_base_.fpn)
