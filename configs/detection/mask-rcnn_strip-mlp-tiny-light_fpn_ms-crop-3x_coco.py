_base_ = [
    '../_base_/models/mask-rcnn_strip-mlp.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/adamw_coco_3x.py',
    '../_base_/det_runtime.py',
]
