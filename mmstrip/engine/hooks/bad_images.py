"""A limit on the number of unreadable images that a training skips."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.samples import count_images


@HOOKS.register_module()
class BadImagesHook(Hook):
    """Log unreadable images that were skipped, and stop the training when there are too many.

    Args:
        path (str): File in which :class:`mmstrip.engine.sampler.SeededSampler` lists them.
        max_share (float): Largest fraction of training images that may be unreadable.

    Raises:
        ValueError: More than ``max_share`` of the training images are unreadable.
    """

    def __init__(self, path: str, max_share: float):
        self.path = Path(path)
        self.max_share = max_share
        self.known: set[str] = set()
        self.seen = 0  # bytes of the file, which is read only when it has grown

    def before_train(self, runner: Runner) -> None:
        if is_main_process():
            self.path.unlink(missing_ok=True)  # from an earlier run; its images may be repaired

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None, outputs: dict | None = None
    ) -> None:
        if not self.path.is_file() or self.path.stat().st_size == self.seen:
            return
        text = self.path.read_text()
        self.seen = len(text.encode())
        lines = dict.fromkeys(text.splitlines())
        new = [line for line in lines if line not in self.known]
        self.known.update(new)
        for line in new:
            runner.logger.warning(f'Skipped ({len(self.known)} so far): {line}')
        total = count_images(runner.train_dataloader.dataset)
        if len(self.known) > self.max_share * total:
            raise ValueError(
                f'{len(self.known)} of {total} training images cannot be read, more than skip_bad_images='
                f'{self.max_share:g} allows; {self.path} lists them'
            )
