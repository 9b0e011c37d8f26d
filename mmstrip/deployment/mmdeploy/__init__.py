"""Export of whole detectors: mmdeploy 1.3.1 with our rewriters for mmdet's heads.

This package is for that version only. Only :mod:`.rewriters` imports mmdeploy, and only a detector's export imports it.
"""

from importlib.metadata import PackageNotFoundError, version

from ..formats import HALF_FORMATS

VERSION = '1.3.1'
MIN_OPSET, OPSET = 16, 17  # RoiAlign has mmcv's half-pixel offset since 16
# One image of a fixed size, boxes by ONNX's NonMaxSuppression, masks as the mask head outputs them.
CONFIG = dict(
    onnx_config=dict(type='onnx', input_shape=None),
    codebase_config=dict(
        type='mmdet',
        task='ObjectDetection',
        model_type='end2end',
        post_processing=dict(export_postprocess_mask=False),  # thresholds come from the model's test_cfg
    ),
    backend_config=dict(type='onnxruntime'),
)


def check_detector(form: str, dynamic: bool) -> None:
    """Check that a whole detector can be exported with the settings.

    Raises:
        ValueError: It cannot, or the required version of mmdeploy is not installed.
    """
    if form not in HALF_FORMATS:
        raise ValueError(f'format must be {" or ".join(HALF_FORMATS)} for whole detectors, but got {form!r}')
    if dynamic:
        raise ValueError(
            'whole detectors are exported for one image of one size: leave out --dynamic-batch and --dynamic-size, '
            'or export the backbone (--features) or neck (--neck)'
        )
    try:
        found = version('mmdeploy')
    except PackageNotFoundError:
        found = 'none'
    if found != VERSION:
        raise ValueError(
            f'whole detectors need mmdeploy {VERSION}, but {found} is installed: run pip install --no-deps '
            f'mmdeploy=={VERSION}, or export the backbone (--features) or neck (--neck)'
        )
