"""`make classifier`, by the commands that it would run, on a few tiny images."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from helpers.runs import run_here
from PIL import Image

from mmstrip.models import StripMLP

NAME = 'strip-mlp-tiny-light_1xb32_caltech101-64px'
SMALL = {
    'model.head.in_channels': '64',
    **{f'{split}_dataloader.num_workers': '0' for split in ('train', 'val', 'test')},
    **{f'{split}_dataloader.persistent_workers': 'False' for split in ('train', 'val', 'test')},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with tiny photographs in the place where the config looks for them."""
    images = tmp_path / 'data/caltech101_96px'
    (images / 'meta').mkdir(parents=True)
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        (images / f'101_ObjectCategories/{index}').mkdir(parents=True)
        Image.fromarray(pixels).save(images / f'101_ObjectCategories/{index}/image_0001.jpg')
    for name, count in (('train', 34), ('train-part', 33), ('held-out', 2), ('test', 2)):
        lines = [f'{i % 2}/image_0001.jpg {i % 2}\n' for i in range(count)]
        (images / f'meta/{name}.txt').write_text(''.join(lines))
    (images / 'meta/classes.txt').write_text(''.join(f'{i}\n' for i in range(101)))
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(StripMLP.arch_zoo, 'tiny-light', dict(embed_dims=8, depths=(1, 1, 1, 1)))
    return tmp_path


def make(epochs: int) -> None:
    """Run the commands of the target, its tools in this process."""
    small = ' '.join(f"'{key}={value}'" for key, value in {**SMALL, 'train_cfg.max_epochs': epochs}.items())
    options = f'OPTIONS=--cfg-options {small}'
    command = [
        'make',
        '-n',
        '--no-print-directory',
        '-o',
        'install',
        '-f',
        str(ROOT / 'Makefile'),
        'classifier',
        options,
    ]
    printed = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    for line in printed.replace('\\\n', ' ').splitlines():
        if line.startswith('.venv/bin/python'):
            expanded = re.sub(r'"\$\(cat (\S+)\)"', lambda found: Path(found[1]).read_text(), line)
            _, tool, *arguments = shlex.split(expanded)
            if tool == 'tools/test.py':
                arguments += ['--cfg-options', *(f'{key}={value}' for key, value in SMALL.items())]
            run_here(tool.removeprefix('tools/'), *arguments)
        else:
            subprocess.run(line, check=True, shell=True)


def test_the_same_command_resumes_and_leaves_its_record(folder):
    make(epochs=1)
    first = (folder / 'work_dirs' / NAME / 'record/log.txt').read_text()
    make(epochs=2)
    record = folder / 'work_dirs' / NAME / 'record'
    log = (record / 'log.txt').read_text()
    assert 'Epoch(val) [1]' in first and 'Epoch(train) [2]' not in first
    assert log.count('Epoch(train) [1]') == 1 and log.count('Epoch(train) [2]') == 1
    assert 'resumed epoch: 1, iter: 1' in log and 'Epoch(test) [1/1]' in log and len(log.splitlines()) < 20
    assert (record / 'curves.png').read_bytes()[:4] == b'\x89PNG'
    assert subprocess.run(['sha256sum', '--check', record / 'config.sha256']).returncode == 0
