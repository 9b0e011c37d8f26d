"""The model to analyze, a config or a registered backbone, as one string."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from mmengine.utils import import_modules_from_strings
from torch import nn

from ..utils.config import build_model, load_model_config

_SCALE_NOISE = 0.1


@dataclass(frozen=True)
class ModelSpec:
    """A model: ``[LABEL=]CONFIG.py`` or ``[LABEL=]TYPE[:KEY=VALUE,...]``.

    Attributes:
        label: Name in tables.
        source: Config file, or registered backbone with its scope, such as 'mmpretrain.SwinTransformer'.
        arguments: Arguments of the backbone.
    """

    label: str
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> 'ModelSpec':
        """Parse ``text``; raise a ValueError for an argument without a value."""
        head = text.split(':')[0]
        label, source = text.split('=', 1) if '=' in head else (None, text)
        source, _, listed = source.partition(':')
        arguments = {}
        for item in filter(None, listed.split(',')):
            key, sign, value = item.partition('=')
            if not sign:
                raise ValueError(f'{text}: arguments must be KEY=VALUE, but got {item!r}')
            arguments[key] = _literal(value)
        stem = Path(source).stem if source.endswith('.py') else source.split('.')[-1]
        return cls(label or '-'.join([stem, *map(str, arguments.values())]), source, arguments)

    def build(self) -> nn.Module:
        """Build the model, with the same random weights each time.

        Raises:
            FileNotFoundError: There is no such config.
            ValueError: The type is not registered, the config has no model, or its arguments do not fit.
        """
        is_config = self.source.endswith('.py')
        return random_model(load_model_config(self.source).model if is_config else self.backbone_config())

    def backbone_config(self) -> dict:
        """The config of a registered backbone; raises a ValueError if none is registered as this type."""
        scope, dot, _ = self.source.partition('.')
        if dot and scope.isidentifier():
            import_modules_from_strings(f'{scope}.models')
        if MODELS.get(self.source) is None:
            raise ValueError(
                f'no model {self.source!r} is registered; use a scope, as in mmpretrain.ResNet, or a config file'
            )
        return dict(type=self.source, **self.arguments)


def random_model(config: dict) -> nn.Module:
    """A registered model with random weights, the same each time, all of which affect its outputs.

    Raises:
        ValueError: It cannot be built with these arguments.
    """
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(config)
        for scale in model.parameters():
            if scale.dim() < 2:  # branch scales and shifts start without effect, at 0, 1 or 1e-6
                scale.add_(_SCALE_NOISE * torch.randn_like(scale))
    return model


def _literal(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
