"""Installation, registries and what is imported when."""

import importlib.util
import itertools
import re
import shutil
import sys
import tarfile
import zipfile

import pytest
from helpers import ROOT, python, run

import mmstrip


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


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    """The source distribution."""
    folder = tmp_path_factory.mktemp('source')
    for name in ('mmstrip', 'benchmarks', 'configs', 'tools', 'requirements', 'tests'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '.mim', '*.so'))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    done = run(sys.executable, 'setup.py', 'sdist', cwd=folder, env=dict(MMSTRIP_NATIVE='0'))
    assert done.returncode == 0, done.stdout
    (archive,) = folder.glob('dist/*.tar.gz')
    return archive


def test_the_source_distribution_holds_what_is_installed_alone(archive):
    with tarfile.open(archive) as opened:
        names = {name.split('/')[1] for name in opened.getnames() if '/' in name}
    assert {'mmstrip', 'configs', 'tools', 'requirements', 'LICENSE', 'CITATION.cff'} <= names
    assert not names & {'benchmarks', 'tests', 'docs'}


def test_the_wheel_without_a_compiler_is_for_any_platform(archive, tmp_path):
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter='data')
    (source,) = tmp_path.iterdir()
    command = [sys.executable, 'setup.py', 'bdist_wheel', '--dist-dir', tmp_path]
    done = run(*command, cwd=source, env=dict(CXX='false', MMSTRIP_NATIVE='1'))
    assert done.returncode == 0 and 'mmstrip: no compiled operators, it works without them' in done.stdout, done.stdout
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.name == f'mmstrip-{mmstrip.__version__}-py3-none-any.whl'
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        'mmstrip/.mim/model-index.yml',
        'mmstrip/.mim/configs/strip_mlp/metafile.yml',
        'mmstrip/.mim/tools/train.py',
        'mmstrip/.mim/configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py',
        'mmstrip/models/strip_mlp.py',
        'mmstrip/ops/csrc/stage.cpp',
        'mmstrip/ops/csrc/tensor.h',
        'mmstrip/py.typed',
    } <= names
    assert not [name for name in names if not name.startswith('mmstrip') or name.endswith('.so')]


def test_what_is_left_out_without_pytorch_is_said_in_one_line():
    """As pip's isolated builds see none."""
    setup = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
    )
    said = python(setup, env=dict(MMSTRIP_NATIVE='1')).stdout.splitlines()
    assert said == [
        'mmstrip: no compiled operators, it works without them, slower on CPUs (PyTorch is not installed)',
        'mmstrip',
    ]


class Environment:
    """Stands for the environment that tools/install.py works on: distributions by name, and what was done to them.

    Args:
        installer: The script's module, which from then on sees and changes this environment.
        *there: Distributions that are installed. 'ops' stands for mmcv's compiled ops that load, 'bad ops' for those
            that do not.
        cached: Whether pip's cache has a wheel of mmcv, and with which ops.
    """

    def __init__(self, installer, monkeypatch, *there: str, cached: str | None = None):
        self.there, self.cached, self.done = dict.fromkeys(there, '2.99.0'), cached, []
        for name in ('pip', 'build', 'fetch_mmcv', 'mmcv_is_right'):
            monkeypatch.setattr(installer, name, getattr(self, name))
        monkeypatch.setattr(installer, 'version', self.there.get)
        monkeypatch.setattr(installer, 'operators_problem', lambda: '' if 'operators' in self.there else 'none')

    def mmcv_is_right(self, with_ops: bool) -> bool:
        loads = 'ops' in self.there and bool({'mmengine', 'onedl-mmengine'} & self.there.keys())
        return loads or ('onedl-mmcv' in self.there and not with_ops and not {'ops', 'bad ops'} & self.there.keys())

    def pip(self, command: str, *arguments: str, **environment: str) -> None:
        names = [argument for argument in arguments if not argument.startswith('-')]
        self.done += [f'{command} {name}' for name in names if 'mmcv' in name]
        if command == 'uninstall':
            for name in [*names, 'ops', 'bad ops']:
                self.there.pop(name, None)
        else:
            self.there.update({name.split('>')[0]: '2.99.0' for name in names})

    def build(self, name: str, command: list, **environment: str) -> None:
        cached = name == 'mmcv' and '--no-cache-dir' not in command and self.cached
        self.done.append('use the cached mmcv' if cached else f'build {name}')
        self.there.update({'onedl-mmcv': '2.99.0', cached or 'ops': ''} if name == 'mmcv' else {name: ''})

    def fetch_mmcv(self) -> None:
        self.done.append('ask for mmcv')


@pytest.fixture
def installer(monkeypatch):
    """tools/install.py as a module."""
    spec = importlib.util.spec_from_file_location('installer', ROOT / 'tools' / 'install.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(installer, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['install.py', *arguments])
    installer.main()


BASE, DETECTION = ('torch', 'torchvision'), {'onedl-mmdetection', 'openvino', 'pytest'}
REQUIRED, OPERATORS = 'install onedl-mmcv>=2.3.5', 'build operators'
ALL, CLASSIFICATION = ['--no-prebuilt'], ['classification']


@pytest.mark.parametrize(
    'arguments, there, cached, done',
    [
        (CLASSIFICATION, (), None, ['install onedl-mmcv', REQUIRED, OPERATORS]),
        # completed later; a prebuilt mmcv is asked for
        ([], ('onedl-mmcv', 'operators'), None, ['uninstall onedl-mmcv', 'ask for mmcv', 'build mmcv', REQUIRED]),
        (ALL, ('onedl-mmcv', 'onedl-mmengine', 'ops', 'operators'), None, [REQUIRED]),  # pip finds the versions right
        (CLASSIFICATION, ('onedl-mmcv', 'onedl-mmengine', 'ops', 'operators'), None, [REQUIRED]),
        # good ops stay where mmengine is missing
        (ALL, ('onedl-mmcv', 'ops'), None, [REQUIRED, OPERATORS]),
        (CLASSIFICATION, ('onedl-mmcv', 'ops'), None, [REQUIRED, OPERATORS]),
        # mmcv is built once or not at all
        (ALL, (), None, ['build mmcv', REQUIRED, OPERATORS]),
        (ALL, (), 'ops', ['use the cached mmcv', REQUIRED, OPERATORS]),
        (ALL, (), 'bad ops', ['use the cached mmcv', 'uninstall onedl-mmcv', 'build mmcv', REQUIRED, OPERATORS]),
        # ops of another torch go even where none are needed
        (
            CLASSIFICATION,
            ('onedl-mmcv', 'onedl-mmengine', 'bad ops'),
            None,
            ['uninstall onedl-mmcv', 'install onedl-mmcv', REQUIRED, OPERATORS],
        ),
    ],
)
def test_what_is_missing_is_installed(arguments, there, cached, done, installer, monkeypatch, capsys):
    environment = Environment(installer, monkeypatch, *BASE, *there, cached=cached)
    install(installer, monkeypatch, *arguments)
    assert environment.done == done and 'bad ops' not in environment.there
    assert {*BASE, 'onedl-mmcv', 'onedl-mmpretrain', str(ROOT), 'operators'} <= environment.there.keys()
    if arguments == CLASSIFICATION:
        assert 'ops' in there or not environment.there.keys() & {'ops', *DETECTION}
    else:
        assert {'ops', *DETECTION} <= environment.there.keys()
    assert 'compiled operators: in use' in capsys.readouterr().out


def test_mmcv_that_cannot_be_built_is_an_error(installer, monkeypatch):
    environment = Environment(installer, monkeypatch, *BASE)
    monkeypatch.setattr(installer, 'build', lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r'mmcv does not work: see .*mmcv-build\.log'):
        install(installer, monkeypatch)
    assert 'onedl-mmdetection' not in environment.there


def test_originals_are_kept(installer, monkeypatch):
    originals = ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmsegmentation')
    environment = Environment(installer, monkeypatch, *BASE, *originals, 'ops')
    install(installer, monkeypatch)
    assert not [name for name in environment.there if name.startswith('onedl-')]
    environment.there.pop('ops')
    with pytest.raises(SystemExit, match=r'mmcv 2.99.0 \(from OpenMMLab\) is installed, but its compiled ops'):
        install(installer, monkeypatch)
    assert 'mmcv' in environment.there


@pytest.mark.parametrize(
    'there, words',
    [
        ({'torch': '2.3.1'}, 'mmstrip needs torch 2.4 or newer, but 2.3.1 is installed'),
        ({'torch': '2.9.0+cpu'}, 'torch 2.9.0+cpu is installed without torchvision'),
    ],
)
def test_a_torch_that_does_not_do_is_left_alone(there, words, installer, monkeypatch):
    environment = Environment(installer, monkeypatch)
    environment.there.update(there)
    with pytest.raises(SystemExit, match=re.escape(words)):
        install(installer, monkeypatch)
    assert environment.there == there


def test_tested_versions_bind_the_tested_torch_alone(installer, monkeypatch):
    tested = re.search('torch==(.*)', installer.TESTED.read_text()).group(1)
    for torch, bound in ((None, True), (tested, True), (f'{tested}+cpu', True), ('2.4.1', False)):
        monkeypatch.setattr(installer, 'version', {'torch': torch}.get)
        assert (str(installer.TESTED) in installer.pip_command('install', 'numpy')) == bound
    assert '-c' not in installer.pip_command('uninstall', 'numpy')


def test_builds_say_how_far_they_are(installer, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    clock = itertools.count(0, 31)
    monkeypatch.setattr(installer.time, 'monotonic', lambda: next(clock))
    lines = '; '.join(f'print("[{number}/3] c++")' for number in (1, 2, 3))
    installer.build('operators', [sys.executable, '-S', '-c', lines])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0] == '[install] operators: 1 of 3 files compiled in 1.6 min'
    assert (tmp_path / 'operators-build.log').read_text().count('c++') == 3
    installer.build('mmcv', [sys.executable, '-S', '-c', 'raise SystemExit(1)'])
    assert 'mmcv could not be built: see ' in capsys.readouterr().out


@pytest.mark.parametrize(
    'targets, installs',
    [
        (('demo', 'demo', 'install', 'transfer', 'demo'), ['tools/install.py classification', 'tools/install.py']),
        (('install', 'demo'), ['tools/install.py']),
    ],
)
def test_make_installs_what_a_target_uses_once(targets, installs, tmp_path):
    shutil.copy(ROOT / 'Makefile', tmp_path)
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    for path in ('tools/install.py', 'setup.py', 'pyproject.toml'):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    stub = tmp_path / '.venv' / 'bin' / 'python'
    stub.write_text('#!/bin/sh\necho "$@" | grep install.py >> calls\nexit 0\n')
    stub.chmod(0o755)
    for target in targets:
        done = run('make', target, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    assert (tmp_path / 'calls').read_text().splitlines() == installs
