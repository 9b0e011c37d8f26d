"""A check before a test that the checkpoint fills the model."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.checkpoints import load_whole, weights_in
from ...utils.wrappers import unwrap_model


@HOOKS.register_module()
class CompleteCheckpointHook(Hook):
    """Refuse a checkpoint that leaves parts of the model as they were drawn at random, where mmengine only warns.

    Raises:
        ValueError: Tensors of the model are missing in the checkpoint, or have other shapes there.
    """

    def __init__(self):
        self.problem = ''

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Try to load it; mmengine does so after this and may have more to say."""
        self.problem = load_whole(unwrap_model(runner.model), weights_in(checkpoint))

    def before_test(self, runner: Runner) -> None:
        if self.problem:
            raise ValueError(f'the checkpoint {self.problem}')
