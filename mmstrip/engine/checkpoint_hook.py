"""A check that a test loads the whole model."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS


@HOOKS.register_module()
class CompleteCheckpointHook(Hook):
    """Refuse a checkpoint that leaves parts of the model as they were drawn at random, where mmengine only warns.

    Raises:
        ValueError: Tensors of the model are missing in the checkpoint.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = runner.model
        while hasattr(model, 'module'):  # DDP, test-time augmentation
            model = model.module
        weights = checkpoint.get('state_dict', checkpoint)
        wanted = list(model.state_dict())
        missing = [key for key in wanted if key not in weights and f'module.{key}' not in weights]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} of the model's {len(wanted)} tensors, first of all "
                f'{", ".join(missing[:5])}; its own first keys are {", ".join(list(weights)[:5])}'
            )
