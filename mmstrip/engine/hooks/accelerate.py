"""Strip-MLP on its faster implementation."""

import sys

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from ...models import StripMLP
from ...ops.accelerate import change_classes
from ...registry import HOOKS


@HOOKS.register_module()
class AccelerateHook(Hook):
    """Call :func:`mmstrip.accelerate` before training, validation and testing.

    At that time the model has its weights and its wrapper, and EMA has its copy. Models without a Strip-MLP are left
    alone, and so are those that the config compiles.

    Args:
        compile (bool, optional): See :func:`mmstrip.accelerate`. Defaults to None: on GPUs yes, on CPUs no.
    """

    def __init__(self, compile: bool | None = None):
        self.compile, self.said = compile, None

    def before_train(self, runner: Runner) -> None:
        model: nn.Module = runner.model
        if runner.cfg.get('compile') or not any(isinstance(module, StripMLP) for module in model.modules()):
            return
        said = f'Strip-MLP: {change_classes(model, self.compile)}'
        if said != self.said:  # once per training, not before each validation
            runner.logger.info(said)
        self.said = said

    before_val = before_test = before_train

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # Its package takes seconds to import, and nothing is chosen where it has not been.
        module = sys.modules.get('mmstrip.ops.gpu.choices')
        if module and module.known:
            checkpoint['meta']['choices'] = dict(module.known)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """A training that resumes on the same card computes in the same way."""
        if runner._resume and (choices := checkpoint['meta'].get('choices')):
            from ...ops.gpu.choices import known

            known.update(choices)
