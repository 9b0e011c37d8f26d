"""Parameters and multiply-adds of models."""

import sys
from importlib import import_module
from typing import NamedTuple

import torch
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, parameter_count
from mmengine.analysis.print_helper import complexity_stats_table
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Complexity(NamedTuple):
    """The cost of a model.

    ``flops`` are the multiply-adds of a forward pass on one image, which the paper calls FLOPs: of convolutions, linear
    layers, matrix products and norms.
    """

    params: int
    flops: int
    table: str  # both per module; empty unless requested


def analyze_complexity(model: nn.Module, shape: tuple[int, int, int], depth: int = 0) -> Complexity:
    """Count parameters and multiply-adds of a model.

    Args:
        model: A model of any toolbox, or a module that takes a batch of images.
        shape: Channels, height and width of the image.
        depth: Depth of modules in the table; no table if 0. Defaults to 0.

    Raises:
        ValueError: ``shape`` is not positive, or the model fails on such images.
    """
    model.eval()
    if min(shape) < 1:
        raise ValueError(f'channels, height and width must be positive, but got {shape}')
    images = torch.rand(1, *shape, device=next(model.parameters()).device)
    if hasattr(model, 'data_preprocessor'):
        model = TensorForward(model, data_samples(model, shape))
    inputs = (images,)
    flops = FlopAnalyzer(model, inputs)
    for analyzer in (flops, activations := ActivationAnalyzer(model, inputs)):
        analyzer.unsupported_ops_warnings(False)
        analyzer.uncalled_modules_warnings(False)
        analyzer.tracer_warnings('none')
    try:
        total = int(flops.total())
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f'the model fails on images {shape}: {str(error).strip()}') from error
    table = complexity_stats_table(flops, max_depth=depth, activations=activations) if depth else ''
    return Complexity(parameter_count(model)[''], total, table)


class TensorForward(nn.Module):
    """A toolbox's model as a function of images only: its 'tensor' mode, which has no losses and returns tensors."""

    def __init__(self, model: nn.Module, data_samples: list | None):
        super().__init__()
        self.model = model
        self.data_samples = data_samples

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images, self.data_samples, mode='tensor')
        return tuple(output for output in tree_leaves(outputs) if isinstance(output, Tensor))


def data_samples(model: nn.Module, shape: tuple[int, int, int], batch: int = 1) -> list | None:
    """What a model's 'tensor' mode needs beside images: for some detectors, sizes and (no) objects."""
    if 'mmdet' not in sys.modules or not isinstance(model, import_module('mmdet.models').BaseDetector):
        return None
    size = tuple(shape[1:])
    sizes = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample = import_module('mmdet.structures').DetDataSample
    return [sample(metainfo=sizes, gt_instances=nothing) for _ in range(batch)]
