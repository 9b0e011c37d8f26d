"""A hook for tests, loaded by custom_imports."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


@HOOKS.register_module(force=True)
class WrapBlockHook(Hook):
    """Put the first block of the backbone under torch's activation checkpointing."""

    def before_run(self, runner) -> None:
        stage = runner.model.backbone.stages[0]
        stage[0] = checkpoint_wrapper(stage[0])
