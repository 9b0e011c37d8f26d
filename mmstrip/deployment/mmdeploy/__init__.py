"""What exports whole detectors: mmdeploy 1.3.1 with heads of ours in the place of its own.

This folder is for that version alone; :mod:`.rewriters` imports mmdeploy, and only the export of a detector imports it.
"""

from importlib.metadata import PackageNotFoundError, version

from ..formats import HALVED

VERSION = '1.3.1'
LEAST_OPSET, OPSET = 16, 17  # 16 is the first whose RoiAlign has mmcv's half pixels
# One image of a fixed size, boxes by ONNX's own NonMaxSuppression, masks as the mask head gives them.
CONFIG = dict(
    onnx_config=dict(type='onnx', input_shape=None),
    codebase_config=dict(
        type='mmdet',
        task='ObjectDetection',
        model_type='end2end',
        post_processing=dict(export_postprocess_mask=False),  # thresholds are those of the model's test_cfg
    ),
    backend_config=dict(type='onnxruntime'),
)


def check_detector(form: str, dynamic: bool) -> None:
    """Whether a whole detector can be exported as asked.

    Raises:
        ValueError: It cannot, or mmdeploy is not installed in the version that this folder is for.
    """
    if form not in HALVED:
        raise ValueError(f'whole detectors are exported to {" and ".join(HALVED)}, but the format is {form}')
    if dynamic:
        raise ValueError(
            'whole detectors take one image of one size: leave out --dynamic-batch and --dynamic-size, '
            'or export --features or --neck'
        )
    try:
        found = version('mmdeploy')
    except PackageNotFoundError:
        found = 'none'
    if found != VERSION:
        raise ValueError(
            f'whole detectors need mmdeploy {VERSION}, but {found} is installed here: '
            f'pip install --no-deps mmdeploy=={VERSION}, or export --features or --neck'
        )
