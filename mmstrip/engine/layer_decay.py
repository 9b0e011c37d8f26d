"""Layer-wise learning-rate decay for fine-tuning."""

from mmengine.model import BaseModel
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .param_groups import GroupedOptimWrapperConstructor

_WRAPPERS = ('module', '_orig_mod', '_checkpoint_wrapped_module')  # attributes in which wrappers hold a module


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(GroupedOptimWrapperConstructor):
    """mmengine's default constructor with layer-wise learning-rate decay for the backbones of any toolbox.

    A layer's learning rate is multiplied by ``layer_decay_rate`` once per layer above it in its backbone. Layers after
    the backbone's blocks, necks and heads keep their rates. A backbone is any module with ``get_layer_depth``
    (:meth:`mmstrip.models.StripMLP.get_layer_depth`) that is not a whole model, under any name and in any wrapper.
    OneCycleLR sets one rate for all layers and so cancels the decay.

    Args:
        optim_wrapper_cfg (dict): See mmengine.
        paramwise_cfg (dict): See mmengine; also has ``layer_decay_rate`` (float), in (0, 1].

    Raises:
        ValueError: ``layer_decay_rate`` is missing or out of range, the optimizer has no ``lr``, or no module has
            ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(self.rate, (int, float)) or not 0 < self.rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate must be a number above 0 and at most 1, but got {self.rate!r}'
            )

    def adjust(self, params: list[dict], model: nn.Module) -> None:
        backbones = {name: part for name, part in model.named_modules() if _is_backbone(part)}
        if not backbones:
            kind = type(model).__name__
            raise ValueError(f'layer_decay_rate needs a backbone with get_layer_depth, but {kind} has none')
        if self.base_lr is None:
            raise ValueError('layer_decay_rate needs a base learning rate: set optim_wrapper.optimizer.lr')
        owners = {}
        for name, backbone in backbones.items():
            prefix = f'{name}.' if name else ''
            for key, parameter in backbone.named_parameters():
                key = '.'.join(part for part in key.split('.') if part not in _WRAPPERS)
                owners.setdefault(id(parameter), (backbone.get_layer_depth, prefix + key, prefix))
        for group in params:
            owner = owners.get(id(group['params'][0]))
            if owner is None:
                continue
            get_layer_depth, name, prefix = owner
            depth, num_depths = get_layer_depth(name, prefix)
            group['lr'] = group.get('lr', self.base_lr) * self.rate ** (num_depths - 1 - depth)


def _is_backbone(module: nn.Module) -> bool:
    """Judged by class, because wrappers forward attributes. Whole models do not count: they ask their backbone."""
    return hasattr(type(module), 'get_layer_depth') and not isinstance(module, BaseModel)
