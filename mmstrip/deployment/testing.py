"""Exported files in place of a config's model, so that its test runs on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData

from ..engine.precision import amp_dtype
from ..registry import MODELS
from .description import read_about
from .formats import SUFFIXES
from .predictor import Predictor


def _add_class(sample, result: dict) -> None:
    sample.set_pred_score(torch.from_numpy(result['pred_scores'])).set_pred_label(result['pred_label'])


def _add_labels(sample, result: np.ndarray) -> None:
    sample.pred_sem_seg = PixelData(data=torch.from_numpy(result)[None])


def _add_detections(sample, result: dict) -> None:
    from mmdet.models.utils.misc import samplelist_boxtype2tensor

    samplelist_boxtype2tensor([sample])  # like mmdet's preprocessing; visualizers need tensors
    sample.pred_instances = InstanceData(**{name: torch.from_numpy(values) for name, values in result.items()})


# How the result of each task is added to a toolbox's data sample.
_ADD = dict(classifier=_add_class, segmentor=_add_labels, detector=_add_detections)
_TASKS = dict(mmpretrain='classifier', mmseg='segmentor', mmdet='detector')


@MODELS.register_module()
class ExportedModel(BaseModel):
    """An exported classifier, segmentor or detector as a model of the toolboxes, for testing only.

    Takes the arguments of :class:`.predictor.Predictor`; ``data_preprocessor`` is ignored, as files include their
    preprocessing.

    Raises:
        ValueError: The file is a backbone or neck; see also :class:`.predictor.Predictor`.
    """

    def __init__(self, file: str, dtype: str = 'float32', trusted: bool = False, data_preprocessor: dict | None = None):
        super().__init__()
        self.predictor = Predictor(file, dtype, trusted)
        task = self.predictor.about['task']
        if task not in _ADD:
            raise ValueError(f'only classifiers, segmentors and detectors can be tested, but {file} is a {task}')

    def test_step(self, data: dict) -> list:
        """Add predictions to the batch's data samples."""
        samples = data['data_samples']
        pixels = [np.asarray(image) for image in data['inputs']]
        for sample, image, outputs in zip(samples, pixels, self.predictor.outputs(pixels, len(pixels))):
            result = self.predictor.result(outputs, image.shape[1:], sample.get('ori_shape', image.shape[1:]))
            _ADD[self.predictor.about['task']](sample, result)
        return samples

    def forward(self, inputs: Sequence, data_samples: list | None = None, mode: str = 'predict') -> list:
        """Required by the base class; tests call :meth:`test_step`."""
        return self.test_step(dict(inputs=inputs, data_samples=data_samples))


def use_exported(config: Config, file: str, amp: str | None = None, trusted: bool = False) -> None:
    """Let a config test an exported file instead of its model, on its data and by its metrics.

    Args:
        amp: See :func:`mmstrip.engine.precision.amp_dtype`; 'auto' is float32 except for OpenVINO.
        trusted: See :class:`.predictor.Predictor`. Defaults to False.

    Raises:
        ValueError: The file's task is not that of the config's toolbox; see also :func:`.description.read_about`.
    """
    task, expected = read_about(file, trusted)['task'], _TASKS.get(config.get('default_scope'))
    if expected not in (None, task):
        raise ValueError(f'the config tests a {expected}, but {file} is a {task}')
    if amp == 'auto' and Path(file).suffix != SUFFIXES['openvino']:
        amp = None  # the others only compute in float32
    dtype = amp_dtype(amp) or 'float32'
    config.model = dict(type='mmstrip.ExportedModel', file=str(file), dtype=dtype, trusted=trusted)
    config.update(load_from=None, resume=False)  # no weights to load
