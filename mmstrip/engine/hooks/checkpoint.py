"""Fault-tolerant checkpoints: a training may be killed at any moment and resumes exactly."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import torch
from mmengine.dist import all_reduce, barrier, get_comm_device, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ...registry import HOOKS
from ...utils.files import remove_unfinished, write_file
from ..host_copy import HostCopy
from ..work_dir import lock_work_dir, unlock_work_dirs

INTERRUPTED = 'interrupted.pth'
BACKEND = 'mmstrip.atomic'
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # of a training that saved and stopped on SIGTERM


@register_backend(BACKEND)
class AtomicBackend(LocalBackend):
    """mmengine's local backend with atomic writes; it removes a file only once its successor exists."""

    def __init__(self):
        self.to_remove: list[str] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_file(filepath, lambda file: file.write(obj))

    def remove(self, filepath: str | Path) -> None:
        self.to_remove.append(str(filepath))

    def remove_now(self, keep: set[str]) -> None:
        for path in set(self.to_remove) - keep:
            Path(path).unlink(missing_ok=True)
        self.to_remove.clear()


_forking = threading.local()  # mask: the signal mask of a thread before it forks


def _block_sigterm() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _unblock_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _restore_sigterm() -> None:
    """Restore SIGTERM's default in a process forked from a training; a process pool could not end it otherwise."""
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), '__self__', None), SafeCheckpointHook):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock_sigterm()


if hasattr(os, 'register_at_fork'):  # not on Windows
    # SIGTERM is blocked meanwhile, because Python drops a signal that arrives before the handler is reset.
    os.register_at_fork(before=_block_sigterm, after_in_parent=_unblock_sigterm, after_in_child=_restore_sigterm)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook for runs that may be killed at any moment and resume exactly where they were saved.

    - Checkpoints and ``last_checkpoint`` are written atomically; old checkpoints are removed afterwards.
    - A run that resumes from a checkpoint saved before its validation validates first; early stopping keeps its count.
    - On SIGTERM, the run finishes its iteration (or validation), saves ``interrupted.pth`` and exits with code 143. The
      next regular checkpoint replaces that file. Several processes run one more iteration, to agree without waiting
      for their GPUs.
    - No other process can train in the work dir meanwhile.

    Takes the arguments of :class:`mmengine.hooks.CheckpointHook`.

    Raises:
        RuntimeError: Another process trains in the work dir.
        OSError: A checkpoint cannot be written, for example on a full disk; older ones stay intact.
    """

    def __init__(self, *args, max_keep_ckpts: int = -1, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_keep = max_keep_ckpts
        self.validated = True
        self.metrics: dict | None = None  # of the last validation
        self.batches_done: dict | None = None  # in the current epoch
        self.stop_requested = False
        self._requests: HostCopy | None = None  # number of processes asked to stop, at the previous iteration
        self.previous_handler = None

    def before_train(self, runner: Runner) -> None:
        local = self.backend_args is None and '://' not in str(self.out_dir or runner.work_dir)
        if local:
            self.backend_args = dict(backend=BACKEND)
        super().before_train(runner)
        self.local = local
        if is_main_process() and local:
            for folder in (self.out_dir, runner.work_dir):
                lock_work_dir(folder)
                remove_unfinished(folder)
        if self.save_best is not None:
            self._forget_foreign_best_checkpoints()
        if threading.current_thread() is threading.main_thread():
            self.previous_handler = signal.signal(signal.SIGTERM, self._request_stop)
        if not self.validated and _validation_due(runner):
            runner.logger.info('The checkpoint was saved before its validation: validating first')
            runner.val_loop.run()

    def _forget_foreign_best_checkpoints(self) -> None:
        """Forget best checkpoints outside this run's folder, because mmengine removes the one it remembers."""

        def own(path) -> str | None:
            name = Path(str(path)).name
            path = self.file_backend.join_path(self.out_dir, name)
            return path if name.startswith('best_') and self.file_backend.isfile(path) else None

        if len(self.key_indicators) == 1:
            self.best_ckpt_path = own(self.best_ckpt_path)
        else:
            self.best_ckpt_path_dict = {key: own(path) for key, path in self.best_ckpt_path_dict.items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        meta = checkpoint.get('meta') or {}
        if not runner._resume or not isinstance(meta, dict):
            return
        self.validated = meta.get('validated', True)
        for hook, state in zip(_early_stopping(runner), meta.get('early_stopping', [])):
            hook.wait_count, hook.best_score = state
            runner.train_loop.stop_training |= hook.wait_count >= hook.patience
        if meta.get('batches_done'):
            self._resume_inside_epoch(runner, **meta['batches_done'])

    @staticmethod
    def _resume_inside_epoch(runner: Runner, done: int, of: int) -> None:
        if len(runner.train_dataloader) == of:
            runner.train_loop.batches_done = done
            return
        runner.logger.warning(
            f'The checkpoint was saved in the middle of an epoch of {of} batches, but an epoch now has '
            f'{len(runner.train_dataloader)}: the epoch starts over'
        )

    def after_train_epoch(self, runner: Runner) -> None:
        self.validated, self.batches_done = False, None
        super().after_train_epoch(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None, outputs: dict | None = None
    ) -> None:
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        self.validated = by_epoch
        self.batches_done = dict(done=batch_idx + 1, of=len(runner.train_dataloader)) if by_epoch else None
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        # Not between accumulated gradients, which are not saved, nor after the last batch of an epoch.
        whole_step = (runner.iter + 1) % getattr(runner.optim_wrapper, '_accumulative_counts', 1) == 0
        if self._should_stop() and whole_step and not (by_epoch and batch_idx + 1 == len(runner.train_dataloader)):
            self._save_and_stop(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.metrics = metrics

    def after_val(self, runner: Runner) -> None:
        self.validated = True
        super().after_val_epoch(runner, self.metrics)  # after other hooks, such as early stopping
        if self._should_stop(now=True):
            self._save_and_stop(runner, dict(epoch=runner.epoch, iter=runner.iter))

    def after_train(self, runner: Runner) -> None:
        super().after_train(runner)
        if self.previous_handler is not None:
            signal.signal(signal.SIGTERM, self.previous_handler)
        unlock_work_dirs()

    def _request_stop(self, *_) -> None:
        self.stop_requested = True

    def _should_stop(self, now: bool = False) -> bool:
        """Whether any process was asked to stop before this iteration (or by now); all get the same answer."""
        if get_world_size() == 1:
            return self.stop_requested
        requests = torch.full((1,), float(self.stop_requested), device=get_comm_device())
        all_reduce(requests)
        copy, before = HostCopy(requests), self._requests
        if not now:
            self._requests, copy = copy, before
        return copy is not None and copy.read() > [0]

    def _save_and_stop(self, runner: Runner, meta: dict) -> None:
        runner.logger.warning(f'SIGTERM: saving {INTERRUPTED} at iteration {meta["iter"]}; continue with --resume')
        self._save(runner, INTERRUPTED, meta)
        barrier()  # launchers kill the others soon after the first one exits
        sys.exit(SIGTERM_EXIT_CODE)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._save(runner, name, meta)
        if is_main_process():
            self._remove_old(step)

    def _save(self, runner: Runner, name: str, meta: dict) -> None:
        place = dict(
            validated=self.validated,
            batches_done=self.batches_done,
            early_stopping=[[hook.wait_count, hook.best_score] for hook in _early_stopping(runner)],
        )
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta | place,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            path = self.file_backend.join_path(self.out_dir, name)
            write_file(Path(runner.work_dir) / 'last_checkpoint', lambda file: file.write(path.encode()))

    def _remove_old(self, step: int) -> None:
        """Remove ``interrupted.pth`` and all but the newest ``max_keep_ckpts`` checkpoints up to this step."""
        if not self.local:
            return
        folder = Path(self.out_dir)
        old = [folder / INTERRUPTED]
        if self.max_keep > 0:
            start, end = re.split(r'\{.*?\}', self.filename_tmpl)
            steps = [file.name[len(start) : len(file.name) - len(end)] for file in folder.glob(f'{start}*{end}')]
            steps = sorted(int(number) for number in steps if number.isdigit() and int(number) <= step)
            old += [folder / self.filename_tmpl.format(number) for number in steps[: -self.max_keep]]
        for path in old:
            if not path.is_dir():  # made by a user
                path.unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        if self.local:
            one, several = getattr(self, 'best_ckpt_path', None), getattr(self, 'best_ckpt_path_dict', {})
            self.file_backend.remove_now(keep={one, *several.values()})


def _early_stopping(runner: Runner) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _validation_due(runner: Runner) -> bool:
    """Whether the loop validates at its current position."""
    loop = runner.train_loop
    loop._decide_current_val_interval()
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    place, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    due = place >= loop.val_begin and (place % loop.val_interval == 0 or place == last)
    return runner.val_loop is not None and due
