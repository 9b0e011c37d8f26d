"""Training loops that resume mid-epoch and reject loaders without a batch."""

from collections.abc import Sized

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from ..registry import LOOPS


def check_batches(loader: DataLoader | None, key: str) -> None:
    """Raise a ValueError if a loader gives no batch."""
    if isinstance(loader, DataLoader) and isinstance(getattr(loader, 'batch_sampler', None), Sized) and not len(loader):
        raise empty_loader_error(loader, key)


def empty_loader_error(loader: DataLoader, key: str) -> ValueError:
    images = len(loader.sampler) if isinstance(loader.sampler, Sized) else len(loader.dataset)
    if not images or not getattr(loader, 'drop_last', False):
        return ValueError(f'{key} gives no batch: its dataset is empty')
    return ValueError(
        f'{key} gives no batch: with drop_last=True, {images} images per process do not fill '
        f'batch_size={loader.batch_size}. Lower batch_size, or set drop_last=False'
    )


def remaining_batches(loader: DataLoader, done: int) -> DataLoader:
    """A loader of an epoch's batches after the first ``done``, which are not loaded."""
    same = ('num_workers', 'collate_fn', 'pin_memory', 'worker_init_fn', 'multiprocessing_context', 'prefetch_factor')
    settings = {name: getattr(loader, name) for name in same}
    return DataLoader(loader.dataset, batch_sampler=list(loader.batch_sampler)[done:], **settings)


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's epoch-based loop, whose first epoch can start after batches that were trained before a stop.

    Attributes:
        batches_done (int): Batches to skip in the next epoch; 0 unless the run was resumed mid-epoch.
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
    """mmengine's iteration-based loop.

    Raises:
        ValueError: The loader gives no batch.
    """

    def run(self) -> nn.Module:
        start = self.iter
        try:
            return super().run()
        except StopIteration as error:
            if self.iter > start:
                raise
            raise empty_loader_error(self.dataloader, 'train_dataloader') from error
