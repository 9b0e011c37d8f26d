"""What exports whole detectors: mmdeploy 1.3.1 with heads of ours in the place of its own.

This folder is for that version alone; :mod:`.rewriters` imports mmdeploy, and only the export of a detector imports it.
"""

from importlib.metadata import PackageNotFoundError, version

VERSION = '1.3.1'
OPSET = 17  # the RoiAlign of 15 and before lacks mmcv's half pixels
# One image of a fixed size, boxes by ONNX's own NonMaxSuppression, masks as the mask head gives them.
CONFIG = dict(
    onnx_config=dict(type='onnx', input_shape=None, opset_version=OPSET),
    codebase_config=dict(
        type='mmdet',
        task='ObjectDetection',
        model_type='end2end',
        post_processing=dict(export_postprocess_mask=False),  # thresholds are those of the model's test_cfg
    ),
    backend_config=dict(type='onnxruntime'),
)


def check_installed() -> None:
    """Whether the mmdeploy that this folder is for is installed.

    Raises:
        ValueError: It is not.
    """
    try:
        found = version('mmdeploy')
    except PackageNotFoundError:
        found = 'none'
    if found != VERSION:
        raise ValueError(
            f'whole detectors need mmdeploy {VERSION}, but {found} is installed here: '
            f'pip install --no-deps mmdeploy=={VERSION}, or export --features or --neck'
        )
