"""Files that are whole or not there."""

import multiprocessing
import time

import pytest

from mmstrip.utils.files import remove_unfinished, write_file


def hang(path) -> None:
    def write(file) -> None:
        file.write(b'half')
        file.flush()
        path.with_name('writing').touch()
        time.sleep(60)

    write_file(path, write)


def test_only_what_dead_processes_left_is_removed(tmp_path):
    """Not what is being written, by an export into the same folder for instance, nor a user's own files."""
    own = ['.notes.tmp', '.epoch_1.pth.tmp', '.epoch_1.pth.abcd1234.tmp', 'epoch_1.pth.mmstrip.tmp']
    for name in own:
        (tmp_path / name).touch()
    process = multiprocessing.get_context('fork').Process(target=hang, args=(tmp_path / 'model.onnx',))
    process.start()
    while not (tmp_path / 'writing').exists():
        time.sleep(0.01)
    everything = {file.name for file in tmp_path.iterdir()}
    remove_unfinished(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == everything
    process.kill()
    process.join()
    remove_unfinished(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*own, 'writing'}


def test_names_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ('ü' * 127)
    write_file(path, lambda file: file.write(b'whole'))
    assert path.read_bytes() == b'whole'


def test_an_error_leaves_the_older_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('older')
    with pytest.raises(ZeroDivisionError):
        write_file(path, lambda file: 1 / 0)
    assert path.read_text() == 'older' and len(list(tmp_path.iterdir())) == 1
