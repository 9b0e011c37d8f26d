"""Two trainings in one work dir."""

import multiprocessing
import os
import signal
import time

import pytest

from mmstrip.engine.work_dir import LOCK, lock_work_dir, unlock_work_dirs

FORK = multiprocessing.get_context('fork')


def in_another_process(call, *arguments) -> str:
    """The error of a call, or ''."""
    with FORK.Pool(1) as pool:
        try:
            pool.apply(call, arguments)
        except RuntimeError as error:
            return str(error)
    return ''


def train_with_workers(folder, worker) -> None:
    lock_work_dir(folder)
    process = FORK.Process(target=time.sleep, args=(60,))
    process.start()
    worker.value = process.pid
    time.sleep(60)


def test_the_second_training_is_refused(tmp_path):
    folder = tmp_path / 'new' / 'work'
    lock_work_dir(folder)
    lock_work_dir(folder)  # of the same process: its hooks, and a notebook that trains again
    words = f'{folder} is in use by another training (process {os.getpid()} on '
    assert words in in_another_process(lock_work_dir, folder)
    unlock_work_dirs()
    assert in_another_process(lock_work_dir, folder) == ''
    lock_work_dir(folder)
    (folder / LOCK).unlink()  # what the error proposes
    assert in_another_process(lock_work_dir, folder) == ''
    unlock_work_dirs()


def test_workers_that_outlive_a_killed_training_do_not_hold_its_work_dir(tmp_path):
    worker = FORK.Value('i', 0)
    training = FORK.Process(target=train_with_workers, args=(tmp_path, worker))
    training.start()
    while not worker.value:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=f'process {training.pid}'):
        lock_work_dir(tmp_path)
    training.kill()
    training.join()
    os.kill(worker.value, 0)  # still there
    lock_work_dir(tmp_path)
    unlock_work_dirs()
    os.kill(worker.value, signal.SIGKILL)


def test_disks_without_locks_are_said(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(38, 'Function not implemented')

    said: list[str] = []
    monkeypatch.setattr('mmstrip.engine.work_dir.print_log', lambda words, *_: said.append(words))
    monkeypatch.setattr('fcntl.lockf', refuse)
    lock_work_dir(tmp_path)
    unlock_work_dirs()
    assert said == [f'{tmp_path} is on a file system without locks: make sure that no other training uses it']


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    (tmp_path / LOCK).symlink_to(tmp_path / 'notes.txt')
    with pytest.raises(OSError, match=LOCK):
        lock_work_dir(tmp_path)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'
