"""All configs, what the READMEs say of them, and their models."""

import re
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from . import ROOT

CONFIGS = sorted((ROOT / 'configs' / 'strip_mlp').glob('*.py'))
DENSE = sorted(path for task in ('detection', 'segmentation') for path in (ROOT / 'configs' / task).glob('*.py'))
COMPARED = sorted((ROOT / 'configs' / 'comparison').glob('*.py'))  # other backbones in our configs
ARCHS = ('tiny-light', 'tiny', 'small', 'base')


def listed_figures() -> dict[str, dict[str, str]]:
    """The rows of the READMEs' tables of configs: path of each config -> its cells by the table's header."""
    rows = {}
    for readme in ROOT.glob('configs/*/README.md'):
        header: list[str] = []
        for line in readme.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip('|').split('|')]
            if cells[0] == 'config':
                header = cells
            elif name := re.match(r'\[.*\]\((.*\.py)\)$', cells[0]):
                rows[str((readme.parent / name.group(1)).relative_to(ROOT))] = dict(zip(header, cells))
    return rows


LISTED = listed_figures()


def build_model(config: Config) -> nn.Module:
    """The model of a config on the meta device, where there are no values to initialise."""
    init_default_scope(config.default_scope)
    with torch.device('meta'), mock.patch('torch.nn.init.trunc_normal_', lambda tensor, **_: tensor):
        return MODELS.build(config.model)


def check_listed_size(path, model) -> None:
    size = LISTED[str(path.relative_to(ROOT))]['params (M)']
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.{len(size.partition(".")[2])}f}' == size
