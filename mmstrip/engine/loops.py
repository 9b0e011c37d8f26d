"""Training loops that resume in the middle of an epoch and refuse loaders without a batch."""

from collections.abc import Sized

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from ..registry import LOOPS


def check_batches(loader: DataLoader | None, key: str) -> None:
    """Refuse a loader that is empty.

    Raises:
        ValueError: It gives no batch.
    """
    if isinstance(loader, DataLoader) and isinstance(getattr(loader, 'batch_sampler', None), Sized) and not len(loader):
        raise no_batch(loader, key)


def no_batch(loader: DataLoader, key: str) -> ValueError:
    """The error of a loader that gives no batch."""
    images = len(loader.sampler) if isinstance(loader.sampler, Sized) else len(loader.dataset)
    drops = getattr(loader, 'drop_last', False) and images > 0
    reason = ' and drop_last=True, which leaves out an incomplete batch' if drops else ''
    advice = 'lower batch_size, or set drop_last=False' if drops else 'the dataset is empty'
    size = f'batch_size={loader.batch_size}'
    return ValueError(f'{key} gives no batch: it has {images} images for each process, {size}{reason}; {advice}')


def remaining_batches(loader: DataLoader, done: int) -> DataLoader:
    """What is left of a loader's epoch after ``done`` batches, without loading those."""
    return DataLoader(
        loader.dataset,
        batch_sampler=list(loader.batch_sampler)[done:],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs, whose first epoch may begin after batches that were trained before a stop.

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


@LOOPS.register_module()
class ResumableIterLoop(IterBasedTrainLoop):
    """mmengine's loop over iterations, which resumes at any of them.

    Raises:
        ValueError: The loader gives no batch.
    """

    def run(self):
        start = self.iter
        try:
            return super().run()
        except StopIteration as error:
            if self.iter > start:
                raise
            raise no_batch(self.dataloader, 'train_dataloader') from error
