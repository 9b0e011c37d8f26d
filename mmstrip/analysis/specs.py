"""Which model to analyse: a config or a registered backbone, written on one line."""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import nn

from .. import ops
from ..deployment.runtimes import RUNTIMES
from ..utils.config import load_config

STORED = ('half', 'int8')  # how an exported model keeps its weights
FORMS = (
    *('autocast', 'bfloat16', 'channels_last', 'compile', 'cudagraphs', 'deploy', 'dynamic', 'freezing'),
    *(*RUNTIMES, *STORED, 'reference', 'recompute'),
)
_SCALE_NOISE = 0.1


@dataclass(frozen=True)
class Spec:
    """What to measure: ``[LABEL=]CONFIG.py`` or ``[LABEL=]TYPE[:KEY=VALUE,...]``, then ``@FORM`` for each form.

    Attributes:
        label: Name in tables.
        source: Config file, or type of a registered backbone with its scope, such as 'mmpretrain.SwinTransformer'.
        arguments: Arguments of the backbone.
        forms: Some of :data:`FORMS`: 'autocast' to bfloat16; 'bfloat16' weights and images; 'channels_last' memory;
            'compile', with 'dynamic' for sizes that change, CUDA graphs of its parts ('cudagraphs') or weights in the
            graph ('freezing'); 'cudagraphs' alone, the eager step as one CUDA graph;
            'deploy', by ``switch_to_deploy()``; 'onnxruntime' or 'openvino', exported to it, with weights in
            float16 ('half') or quantised ('int8'); 'reference' or 'recompute', Strip-MLP on that implementation
            (:func:`mmstrip.ops.use`).
    """

    label: str
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)
    forms: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> 'Spec':
        """Raises ValueError for an unknown form or an argument without a value."""
        body, *forms = text.split('@')
        unknown = [form for form in forms if form not in FORMS]
        if unknown:
            raise ValueError(f'{text}: forms are {", ".join(FORMS)}, but got {", ".join(unknown)}')
        if set(STORED) & set(forms) and not set(RUNTIMES) & set(forms):
            raise ValueError(f'{text}: {" and ".join(STORED)} go with {" or ".join(RUNTIMES)}')
        head = body.split(':')[0]
        label, source = body.split('=', 1) if '=' in head else (None, body)
        source, _, listed = source.partition(':')
        arguments = {}
        for item in filter(None, listed.split(',')):
            key, sign, value = item.partition('=')
            if not sign:
                raise ValueError(f'{text}: arguments are written KEY=VALUE, but got {item!r}')
            arguments[key] = _literal(value)
        name = label or '-'.join(
            [Path(source).stem if source.endswith('.py') else source.split('.')[-1], *map(str, arguments.values())]
        )
        return cls(' '.join([name, *(f'@{form}' for form in forms)]), source, arguments, tuple(forms))

    def implementation(self) -> AbstractContextManager:
        """A context in which the model runs as its forms ask."""
        named = [form for form in self.forms if form in ops.IMPLEMENTATIONS]
        return ops.use(named[0]) if named else nullcontext()

    def build(self) -> nn.Module:
        """The model, without its weights' checkpoint: the same random weights in each form.

        Raises:
            FileNotFoundError: There is no such config.
            ValueError: The type is not registered, or 'deploy' is asked of what has no such form.
        """
        model = random_model(self._config())
        if 'deploy' in self.forms:
            backbone = getattr(model, 'backbone', model)
            if not hasattr(backbone, 'switch_to_deploy'):
                raise ValueError(f'{self.label}: {type(backbone).__name__} has no deploy form')
            backbone.switch_to_deploy()
        return model

    def _config(self) -> dict:
        if not self.source.endswith('.py'):
            return self.backbone_config()
        config = load_config(self.source)
        init_default_scope(config.get('default_scope', 'mmengine'))
        return config.model

    def backbone_config(self) -> dict:
        """The config of a registered backbone; ValueError where none is registered by that type."""
        scope = self.source.partition('.')[0]
        if '.' in self.source:
            import_modules_from_strings(f'{scope}.models')
        if MODELS.get(self.source) is None:
            raise ValueError(f'no model {self.source!r} is registered; write its scope, as mmpretrain.ResNet')
        return dict(type=self.source, **self.arguments)


def random_model(config: dict) -> nn.Module:
    """A model of the registry with random weights, the same each time, of which all count in its outputs."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS.build(config)
        for scale in model.parameters():
            if scale.dim() < 2:  # scales and shifts of branches start where nobody sees them: at 0, 1 or 1e-6
                scale.add_(_SCALE_NOISE * torch.randn_like(scale))
    return model


def _literal(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
