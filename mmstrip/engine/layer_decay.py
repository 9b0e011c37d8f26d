"""Learning rates that fall from layer to layer towards the image, for fine-tuning."""

from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .param_groups import GroupedOptimWrapperConstructor


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(GroupedOptimWrapperConstructor):
    """mmengine's default constructor, with layer-wise learning-rate decay of the backbone, in any toolbox.

    A layer's learning rate is multiplied by ``layer_decay_rate`` once for each layer above it in the backbone. What
    follows the backbone's blocks, neck and heads keep theirs. The depths are those of ``backbone.get_layer_depth``
    (:meth:`mmstrip.models.StripMLP.get_layer_depth`). OneCycleLR sets one rate for all layers, so it undoes the decay.

    Args:
        optim_wrapper_cfg (dict): As of mmengine.
        paramwise_cfg (dict): As of mmengine, and ``layer_decay_rate`` (float), in (0, 1].

    Raises:
        ValueError: ``layer_decay_rate`` is missing or no such number, or the backbone has no ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(self.rate, (int, float)) or not 0 < self.rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate must be a number above 0 and at most 1, but got {self.rate!r}'
            )

    def adjust(self, params: list[dict], model: nn.Module) -> None:
        get_layer_depth = getattr(getattr(model, 'backbone', None), 'get_layer_depth', None)
        if get_layer_depth is None:
            raise ValueError(f'layer_decay_rate needs a backbone with get_layer_depth, but {type(model)} has none')
        if self.base_lr is None:
            raise ValueError('layer_decay_rate needs optim_wrapper.optimizer.lr, which the config lacks')
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in params:
            depth, num_depths = get_layer_depth(names[id(group['params'][0])], 'backbone.')
            group['lr'] = group.get('lr', self.base_lr) * self.rate ** (num_depths - 1 - depth)
