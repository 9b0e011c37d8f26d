"""Installation, registries and what is imported when."""

import shutil
import sys
import zipfile

import pytest
from helpers import ROOT, python, run
from mmengine.config import Config

import mmstrip

BUILD = """
import os, sys
from importlib import import_module
import mmengine.registry  # what follows shares the time that PyTorch takes, and nothing of mmstrip or the toolboxes
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        models = import_module(name).MODELS
        assert 'mmstrip' not in sys.modules
        model = models.build(dict(type='mmstrip.StripMLP', arch='tiny-light', img_size=32))
        print(name, type(model), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_toolbox_builds_it_by_name(tmp_path):
    registries = [f'{package}.registry' for package in ('mmengine', 'mmpretrain', 'mmdet', 'mmseg')]
    done = run(sys.executable, '-c', BUILD, *registries, cwd=tmp_path)
    for name in registries:
        assert f"{name} <class 'mmstrip.models.strip_mlp.StripMLP'>" in done.stdout, done.stdout


@pytest.mark.parametrize('name, version', [('mmengine', '0.7.4'), ('mmcv', '1.7.2')])
def test_missing_and_old_requirements_are_said_plainly(name, version, tmp_path):
    hidden = f'import sys; sys.modules["{name}"] = None; import mmstrip'
    last = python(hidden, cwd=tmp_path).stdout.strip().split('\n')[-1]
    assert last.startswith(f'ImportError: mmstrip needs {name}>=') and 'not installed' in last
    assert f"pip install 'onedl-{name}" in last
    old = (
        f'import sys, types; m = types.ModuleType("{name}"); m.__version__ = "{version}"; '
        f'sys.modules["{name}"] = m; import mmstrip'
    )
    last = python(old, cwd=tmp_path).stdout.strip().split('\n')[-1]
    assert f'but {version} is installed' in last and 'pip install' in last


def test_configs_are_inherited_by_other_projects(tmp_path):
    (tmp_path / 'mine.py').write_text(
        "_base_ = ['mmstrip::strip_mlp/strip-mlp-tiny_8xb128_in1k.py']\nmodel = dict(head=dict(num_classes=7))\n"
    )
    config = Config.fromfile(tmp_path / 'mine.py')
    assert config.model.backbone.type == 'mmstrip.StripMLP' and config.model.head.num_classes == 7


def test_wheel_holds_configs_tools_and_index(tmp_path, monkeypatch):
    monkeypatch.setenv('MMSTRIP_NATIVE', '0')  # compiling takes a minute
    source = tmp_path / 'source'
    source.mkdir()
    for name in ('mmstrip', 'configs', 'tools', 'requirements'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'model-index.yml'):
        shutil.copy(ROOT / name, source / name)
    done = run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, source)
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        'mmstrip/.mim/model-index.yml',
        'mmstrip/.mim/configs/strip_mlp/metafile.yml',
        'mmstrip/.mim/tools/train.py',
        'mmstrip/.mim/configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py',
        'mmstrip/models/strip_mlp.py',
    } <= names
    assert not [name for name in names if name.startswith(('tests', 'configs', 'tools'))]


def test_version():
    assert mmstrip.__version__.count('.') == 2
