"""Expected duration of the runs on two cores of an AMD EPYC; see docs/results.md."""

from .experiments import EPOCHS
from .run import Run

# Config, or part with another resolution -> approximate minutes per epoch on one core.
MINUTES = {
    'strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py': 1.6,
    'comparison/resnet18_1xb32_caltech101-64px.py': 1.2,
    'comparison/resnet50_1xb32_caltech101-64px.py': 2.8,
    'comparison/convnext-tiny_1xb32_caltech101-64px.py': 2.8,
    'comparison/swin-tiny_1xb32_caltech101-64px.py': 2.8,
    'strip_mlp/strip-mlp-pico_1xb128_cifar10-64px.py': 2.4,
    'ablations-128px': 10,
    'strip_mlp/strip-mlp-tiny-light_1xb64_fashion-mnist-32px.py': 6,
    'strip_mlp/strip-mlp-nano_1xb64_fashion-mnist-64px.py': 6,
    'strip_mlp/strip-mlp-pico_1xb64_fashion-mnist-128px.py': 5,
    'detection/retinanet_strip-mlp-tiny-light_fpn_1xb8_bccd.py': 3,
    'comparison/retinanet_resnet18_fpn_1xb8_bccd.py': 2,
    'segmentation/strip-mlp-tiny-light_fpn_1xb4_camvid.py': 2.5,
    'comparison/resnet18_fpn_1xb4_camvid.py': 1.7,
    'strip_mlp/strip-mlp-tiny-light_caltech101-pre_1xb64_cifar10-64px.py': 15,
    'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py': 1.6,
}


def expected_minutes(run: Run) -> float:
    """Minutes on one core; one minute per epoch for an unknown config."""
    return MINUTES.get(run.part, MINUTES.get(run.config, 1)) * run.options[EPOCHS]
