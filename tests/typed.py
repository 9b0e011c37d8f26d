"""User code of the public API that mypy and pyright must accept (``make lint``); nothing runs it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mmstrip
from mmstrip.converters.reparameterize import convert_to_deploy
from mmstrip.deployment import Export, Predictor, export_model, load
from mmstrip.engine.hooks import AccelerateHook, ClassificationReportHook, TrainingCurvesHook
from mmstrip.models import StripMLP
from mmstrip.own_data import write_classification, write_detection, write_segmentation
from mmstrip.zoo import register_models


class Classifier(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.backbone = StripMLP('tiny-light', img_size=(224, 192), out_indices=(2, 3), norm_cfg=dict(type='BN'))
        self.head = nn.Linear(640, classes)

    def forward(self, images: Tensor) -> Tensor:
        last: Tensor = self.backbone(images)[-1]
        scores: Tensor = self.head(last.mean((2, 3)))
        return scores


def faster(classes: int) -> nn.Module:
    model: nn.Module = mmstrip.accelerate(Classifier(classes), compile=True)
    return mmstrip.restore(model)


def features(images: Tensor) -> tuple[Tensor, ...]:
    backbone = StripMLP(dict(embed_dims=16, depths=(1, 1, 2, 1)), img_size=64).train(False)
    backbone.switch_to_deploy()
    with torch.no_grad():
        maps: tuple[Tensor, ...] = backbone.forward(images)
    return maps


def own_data(folder: Path) -> list[Path]:
    register_models()
    written = [
        write_classification(folder / 'pets', arch='tiny', epochs=10),
        write_detection(str(folder), size=640, model='dino'),
        write_segmentation(folder, init='classifier.pth', batch_size=4),
    ]
    return [one.config for one in written]


def deployed(config: Path, checkpoint: Path) -> list[dict[str, object]]:
    convert_to_deploy(str(config), str(checkpoint), 'deploy.pth')
    difference: float | None = export_model(str(config), str(checkpoint), 'model.onnx', Export(shape=(224, 224)))
    predictor: Predictor = load('model.onnx', dtype='float32')
    about: dict[str, object] = predictor.about
    assert difference is not None and about['classes']
    outputs = next(predictor.outputs([np.zeros((3, 224, 224), np.uint8)]))
    predictor.result(outputs, inside=(224, 224), size=(224, 224))
    return predictor([Path('one.jpg'), np.zeros((224, 224, 3), np.uint8)], batch_size=2)


HOOKS = [AccelerateHook(), ClassificationReportHook(), TrainingCurvesHook()]
STATUS: str = mmstrip.ops.status()
VERSION: str = mmstrip.__version__
