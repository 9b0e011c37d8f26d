# How mmdeploy exports our detectors: one image of a fixed size, boxes by ONNX's own NonMaxSuppression, masks as the
# mask head gives them. tools/deployment/export.py sets the version of the operators, --opset.
onnx_config = dict(
    type='onnx',
    opset_version=17,  # 16 is the first whose RoiAlign has mmcv's half pixels
    input_names=['images'],
    output_names=['boxes', 'labels', 'masks'],
    input_shape=None,
    keep_initializers_as_inputs=False,
)
codebase_config = dict(
    type='mmdet',
    task='ObjectDetection',
    model_type='end2end',
    post_processing=dict(export_postprocess_mask=False),  # thresholds are those of the model's test_cfg
)
backend_config = dict(type='onnxruntime')
