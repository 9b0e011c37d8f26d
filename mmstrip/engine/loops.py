"""A training loop that goes on in the middle of an epoch."""

from mmengine.runner import EpochBasedTrainLoop

from ..datasets.drawing import remaining_batches
from ..registry import LOOPS


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs, whose first epoch may begin behind batches that were trained before a stop.

    Attributes:
        batches_done (int): Batches of the coming epoch that are skipped; 0 but for a resumed run.
    """

    batches_done = 0

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done, self.batches_done = self.batches_done, 0
        batches = remaining_batches(self.dataloader, done) if done else self.dataloader
        for index, batch in enumerate(batches, done):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
