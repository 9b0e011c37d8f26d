"""A model to measure and its forms, written on one line."""

from dataclasses import dataclass

from torch import nn

from mmstrip.analysis.specs import ModelSpec
from mmstrip.deployment.runtimes import RUNTIMES

STORED = ('half', 'int8')  # weights of exported models
FORMS = (
    *('autocast', 'bfloat16', 'channels_last', 'compile', 'cudagraphs', 'deploy', 'dynamic', 'freezing'),
    *(*RUNTIMES, *STORED, 'reference'),
)


@dataclass(frozen=True)
class Spec(ModelSpec):
    """What to measure: a model, see :class:`ModelSpec`, followed by ``@FORM`` for each form.

    Attributes:
        forms: Some of :data:`FORMS`: 'autocast' to bfloat16; 'bfloat16' weights and images; 'channels_last' memory;
            'compile', with 'dynamic' shapes, CUDA graphs of its parts ('cudagraphs') or weights as constants
            ('freezing'); 'cudagraphs' alone, the eager step as one CUDA graph; 'deploy', after
            ``switch_to_deploy()``; 'onnxruntime' or 'openvino', exported to it, with weights in float16 ('half') or
            quantized ('int8'); 'reference', without :func:`mmstrip.accelerate`, as compiled and exported models are.
    """

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
        model = ModelSpec.parse(body)
        label = ' '.join([model.label, *(f'@{form}' for form in forms)])
        return cls(label, model.source, model.arguments, tuple(forms))

    @property
    def is_accelerated(self) -> bool:
        """Whether a Strip-MLP in the model runs by :func:`mmstrip.accelerate`."""
        return not {'reference', 'compile', *RUNTIMES} & set(self.forms)

    def build(self) -> nn.Module:
        """See :class:`ModelSpec`; ValueError also for 'deploy' of a backbone without a deploy form."""
        model = super().build()
        if 'deploy' in self.forms:
            backbone = getattr(model, 'backbone', model)
            if not hasattr(backbone, 'switch_to_deploy'):
                raise ValueError(f'{self.label}: {type(backbone).__name__} has no deploy form')
            backbone.switch_to_deploy()
        return model
