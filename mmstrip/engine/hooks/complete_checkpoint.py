"""A check before a test that the checkpoint fills the model."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.wrappers import unwrap_model


@HOOKS.register_module()
class CompleteCheckpointHook(Hook):
    """Refuse a checkpoint that leaves parts of the model as they were drawn at random, where mmengine only warns.

    Raises:
        ValueError: Tensors of the model are missing in the checkpoint.
    """

    def __init__(self):
        self.problem = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look for missing tensors; the loading itself comes after this and may have more to say."""
        weights = checkpoint.get('state_dict', checkpoint)
        expected = list(unwrap_model(runner.model).state_dict())
        missing = [key for key in expected if key not in weights and f'module.{key}' not in weights]
        if missing:
            self.problem = (
                f"the checkpoint lacks {len(missing)} of the model's {len(expected)} tensors, first of all "
                f'{", ".join(missing[:5])}; its own first keys are {", ".join(list(weights)[:5])}'
            )

    def before_test(self, runner: Runner) -> None:
        if self.problem:
            raise ValueError(self.problem)
