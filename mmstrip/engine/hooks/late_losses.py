"""Logs losses without waiting for the GPU in each iteration."""

from collections import deque

from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.runner import Runner

from ...registry import HOOKS
from ..host_copy import HostCopy, copies_of


@HOOKS.register_module()
class LateLossesHook(RuntimeInfoHook):
    """mmengine's RuntimeInfoHook, except that losses on a GPU reach the message hub once they are copied to the host.

    If the host read each loss at once, it would wait for the GPU, and then the GPU for the host's next work. All losses
    are in the hub when mmengine's hook logs, at the end of an epoch, and in checkpoints.
    """

    def __init__(self):
        super().__init__()
        self._late: deque[tuple[list[str], HostCopy]] = deque()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None, outputs: dict | None = None
    ) -> None:
        if not self._late and not any(getattr(value, 'is_cuda', False) for value in (outputs or {}).values()):
            return super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self._late.extend(copies_of(outputs or {}))
        logs = self.end_of_epoch(runner.train_dataloader, batch_idx) or any(
            hook.every_n_inner_iters(batch_idx, hook.interval) for hook in runner.hooks if isinstance(hook, LoggerHook)
        )
        self._write(runner, wait=logs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self._late:
            self._write(runner, wait=True)
            checkpoint['message_hub'] = runner.message_hub.state_dict()

    def _write(self, runner: Runner, wait: bool) -> None:
        while self._late and (wait or self._late[0][1].arrived()):
            names, values = self._late.popleft()
            for name, value in zip(names, values.read()):
                runner.message_hub.update_scalar(f'train/{name}', value)
