"""All configs, what the metafiles say of them, and their models."""

from unittest import mock

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from . import ROOT

CONFIGS = sorted((ROOT / 'configs' / 'strip_mlp').glob('*.py'))
DENSE = sorted(path for task in ('detection', 'segmentation') for path in (ROOT / 'configs' / task).glob('*.py'))
ARCHS = ('tiny-light', 'tiny', 'small', 'base')


def listed_figures() -> dict:
    """What the metafiles say of each config."""
    files = [ROOT / name for name in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']]
    entries = [entry for file in files for entry in yaml.safe_load(file.read_text())['Models']]
    return {entry['Config']: entry['Metadata'] for entry in entries}


LISTED = listed_figures()


def build_model(config: Config) -> nn.Module:
    """The model of a config on the meta device, where there are no values to initialise."""
    init_default_scope(config.default_scope)
    with torch.device('meta'), mock.patch('torch.nn.init.trunc_normal_', lambda tensor, **_: tensor):
        return MODELS.build(config.model)


def check_listed_size(path, model) -> None:
    listed = LISTED.get(str(path.relative_to(ROOT)))
    assert listed is None or sum(p.numel() for p in model.parameters()) == listed['Parameters']
