"""The benchmark of loaders: what it compares, and its table."""

import json
import sys
from unittest import mock

import cv2
import numpy as np
import pytest
import torch

from benchmarks.speed import loader


@pytest.fixture(autouse=True)
def threads_as_they_were():
    threads = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def run(*arguments):
    with mock.patch.object(sys, 'argv', ['loader', *map(str, arguments)]), mock.patch.object(loader, '_MADE', 2):
        loader.main()


def test_all_pipelines_are_compared(tmp_path, capsys):
    run('--rounds', 2, '--out', tmp_path / 'loader.json')
    printed = capsys.readouterr().out
    rows = [line.strip('| ').split(' | ') for line in printed.splitlines() if 'px |' in line or 'to 800 |' in line]
    toolboxes = (toolbox for _, toolbox, _ in loader.TASKS.values())
    whose = [name for toolbox in toolboxes for name in ('mmstrip', toolbox, 'torchvision v2')]
    assert [row[1] for row in rows] == whose
    saved = json.loads((tmp_path / 'loader.json').read_text())
    assert saved['machine']['cpu'] and list(saved['milliseconds']) == list(loader.TASKS)
    for values, row in zip((v for task in saved['milliseconds'].values() for v in task.values()), rows):
        assert len(values) == 2 and min(values) > 0
        assert float(row[2].split()[0]) == pytest.approx(np.median(values), abs=0.006)
        assert float(row[3]) == pytest.approx(1e3 / np.median(values), abs=0.6)


@pytest.mark.parametrize('task', loader.TASKS)
def test_pipelines_get_equal_images_from_equal_seeds(task, tmp_path):
    """That of the toolbox has nothing of ours; torchvision's gives images of the same kind."""
    with mock.patch.object(loader, '_MADE', 1):
        (image,) = loader.make_images(tmp_path)
    sample = loader.annotate(image, tmp_path)
    pipelines = loader.pipelines(task)
    assert not any(type(step).__module__.startswith('mmstrip') for step in pipelines['toolbox'].transforms)
    packed = []
    for name in ('mmstrip', 'toolbox'):
        np.random.seed(1)
        packed.append(pipelines[name](dict(sample))['inputs'])
    assert packed[0].shape == packed[1].shape and packed[0].dtype == torch.uint8
    assert (packed[0].int() - packed[1].int()).abs().float().mean() < 0.1
    given = pipelines['torchvision v2'](dict(sample))
    given = given[0] if isinstance(given, tuple) else given
    assert given.dtype == torch.uint8 and given.shape[0] == 3


def test_images_of_a_folder(tmp_path):
    (tmp_path / 'cat').mkdir()
    for name in ('cat/a.JPG', 'b.jpeg', 'c.png'):
        (tmp_path / name).touch()
    assert sorted(path.name for path in loader.find_images(tmp_path, 9)) == ['a.JPG', 'b.jpeg']
    assert len(loader.find_images(tmp_path, 1)) == 1
    with pytest.raises(SystemExit, match='no .*jpg.*nothing'):
        run(tmp_path / 'nothing')
