"""What a checkpoint may hold: finite weights and plain values."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.plain_values import to_plain
from ...utils.wrappers import unwrap_model

_WEIGHTS = ('state_dict', 'ema_state_dict')


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Bring what is about to be saved, by any hook, into plain values that load without running code.

    What cannot be plain is left out and named in a warning, once; so is what will come back as another type. Arrays of
    NumPy and sets come back as they were.

    Raises:
        FloatingPointError: A weight, a statistic of BN or an average of weights (EMA) is NaN or infinite. Infinite
            buffers are let be that were so before the training, such as masks.
        TypeError: A weight is of a kind of tensors that needs code to be loaded.
    """

    priority = 'LOWEST'  # after all hooks that put something into a checkpoint

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
                        f'{name} holds NaN or infinite values at iteration {runner.iter}: nothing is saved, the '
                        f'checkpoints in {runner.work_dir} are from before it'
                    )
        plain, remarks = to_plain(checkpoint)
        for key, words in remarks.items():
            if key.startswith(_WEIGHTS) and 'Tensor' in words:
                raise TypeError(f'{key} {words}: convert it to a torch.Tensor before the training')
        # Schedulers have methods among their attributes, which they make anew.
        remarks = {key: words for key, words in remarks.items() if not key.startswith('param_schedulers.')}
        for key in remarks.keys() - self.said:
            runner.logger.warning(f'Checkpoints: {key} {remarks[key]}')
        self.said |= remarks.keys()
        checkpoint.clear()
        checkpoint.update(plain)


def _holds(test, value) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()) and test(value).any()
