"""Checkpoints of finite weights and plain values only."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.plain_values import to_plain
from ...utils.wrappers import unwrap_model

_WEIGHTS = ('state_dict', 'ema_state_dict')


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Convert what any hook is about to save to plain values, which load without running code.

    A warning names, once, each value that is left out because it has no plain form or that will come back as another
    type. NumPy arrays and sets come back unchanged.

    Raises:
        FloatingPointError: A weight, BN statistic or averaged weight (EMA) is NaN or infinite. Buffers that were
            infinite before the training, such as masks, are allowed.
        TypeError: A weight is a tensor subclass that needs code to load.
    """

    priority = 'LOWEST'  # after all hooks that add to a checkpoint

    def __init__(self):
        self.infinite: set[str] = set()
        self.said: set[str] = set()

    def before_run(self, runner: Runner) -> None:
        buffers = dict(unwrap_model(runner.model).named_buffers())
        self.infinite = {name for name, buffer in buffers.items() if _holds(torch.isinf, buffer)}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for part in _WEIGHTS:
            for name, value in checkpoint.get(part, {}).items():
                name = name.removeprefix('module.')
                if _holds(torch.isnan, value) or (name not in self.infinite and _holds(torch.isinf, value)):
                    raise FloatingPointError(
                        f'{name} contains NaN or infinite values at iteration {runner.iter}. Nothing was saved; the '
                        f'checkpoints in {runner.work_dir} are from before it'
                    )
        plain, remarks = to_plain(checkpoint)
        for key, words in remarks.items():
            if key.startswith(_WEIGHTS) and 'Tensor' in words:
                raise TypeError(f'{key} {words}. Convert it to a torch.Tensor before training')
        # Schedulers save methods among their attributes, but create them again on loading.
        remarks = {key: words for key, words in remarks.items() if not key.startswith('param_schedulers.')}
        for key in remarks.keys() - self.said:
            runner.logger.warning(f'Checkpoints: {key} {remarks[key]}')
        self.said |= remarks.keys()
        checkpoint.clear()
        checkpoint.update(plain)


def _holds(test, value) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()) and test(value).any()
