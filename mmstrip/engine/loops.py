"""Training loops that resume in the middle of an epoch and explain why data stopped coming."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from ..registry import LOOPS


@contextmanager
def explained_worker_death(workers: int) -> Iterator[None]:
    """Say what to do when the system has killed one of the processes that load data."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # What a worker itself has raised comes as 'Caught ... in DataLoader worker'.
        caught, words = str(error).startswith('Caught '), 'DataLoader worker (pid'
        if not workers or caught or (isinstance(error, RuntimeError) and words not in str(error)):
            raise
        raise RuntimeError(
            f'a process that loads data was killed ({error}). Mostly the memory was full: lower '
            'train_dataloader.num_workers, or give the job more memory (in containers, more shared memory as well)'
        ) from error


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


class _ExplainedLoop:
    """Of a training loop: errors of its loader say what to do."""

    def run(self):
        start = self.iter
        try:
            with explained_worker_death(self.dataloader.num_workers):
                return super().run()
        except StopIteration as error:
            if self.iter > start:
                raise
            raise no_batch(self.dataloader, 'train_dataloader') from error


@LOOPS.register_module()
class ResumableEpochLoop(_ExplainedLoop, EpochBasedTrainLoop):
    """mmengine's loop over epochs, whose first epoch may begin after batches that were trained before a stop.

    Attributes:
        batches_done (int): Batches of the coming epoch that are skipped; 0 but for a resumed run.

    Raises:
        RuntimeError: A process that loads data was killed.
        ValueError: The loader gives no batch.
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
class ResumableIterLoop(_ExplainedLoop, IterBasedTrainLoop):
    """mmengine's loop over iterations, which resumes at any of them.

    Raises:
        RuntimeError: A process that loads data was killed.
        ValueError: The loader gives no batch.
    """
