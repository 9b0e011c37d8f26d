"""Random states that depend on the place in the training alone."""

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.wrappers import unwrap_model
from ..seeding import seed_all
from ..stateful import stateful_parts


@HOOKS.register_module()
class SeedHook(Hook):
    """Before each training iteration, seed what the model draws (mixup, drop path, ...) by seed, rank and iteration.

    A run that is resumed then draws what it would have drawn without the stop, and no random state has to be saved.
    Transforms that keep a state of their own are named in a warning.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        parts = stateful_parts(runner.train_dataloader.dataset, unwrap_model(runner.model).data_preprocessor)
        if parts:
            runner.logger.warning(
                f'{", ".join(parts)}: its state is not in checkpoints, so a resumed run differs from an undisturbed one'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed_all((runner.seed, 0, get_rank(), runner.iter), cuda=True)
