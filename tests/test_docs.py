"""What the documentation says can be done: commands, options, files, links and code of all pages."""

import argparse
import ast
import contextlib
import functools
import io
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, blocks
from helpers.configs import build_model
from mmengine.registry import MODELS
from PIL import Image

from mmstrip.utils.config import load_config

PAGES = sorted(
    [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('benchmarks/*.md'), *ROOT.glob('configs/*/README.md')]
)
TOOLS = [str(path.relative_to(ROOT)) for path in ROOT.glob('tools/**/*.py') if path.name != 'torchrun.py']
BENCHMARKS = ('evidence', 'gpu', 'gpu.count', 'speed', 'speed.loader', 'transfer')
TOOLS += ['demo/app.py', *(f'benchmarks.{name}' for name in BENCHMARKS)]
# Where a script of the shell puts the arguments of the tool that it starts.
SCRIPTS = {'dist_train.sh': ('train.py', 2), 'dist_test.sh': ('test.py', 3), 'slurm_train.sh': ('train.py', 4)}
FOREIGN_OPTIONS = {
    *(
        '--force-reinstall',
        '--inplace',
        '--no-build-isolation',
        '--no-cache-dir',
        '--no-deps',
        '--no-isolation',
        '--requeue',
        '--signal',
        '--wheel',
    ),
    # The toolboxes' tools.
    *('--fuse-conv-bn', '--method', '--save-path', '--style', '--target-category', '--target-layers'),
}
# How errors of other packages begin on the page of errors, and one that tells a name and a value.
FOREIGN_ERRORS = (
    *('KeyError:', 'ModuleNotFoundError:', 'TypeError:', 'AssertionError:', 'IndexError:', 'TraceError:'),
    *("can't open file", 'expected input', 'Expected to have', 'ValueError: end', 'ValueError: ... mmstrip'),
    'FloatingPointError: loss is nan',
)
TASKS = ('classification', 'detection', 'segmentation')
NUMBERS = {'SIZE': '224', 'H': '224', 'W': '224'}
CONFIGS = (
    'strip_mlp/strip-mlp-tiny_8xb128_in1k',
    'detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes',
    'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes',
)

by_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def inline(page: Path) -> list[str]:
    """Code within sentences and tables."""
    prose = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    return [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', prose)]


def commands(page: Path) -> list[list[str]]:
    """The words of each command, its comment and variables taken off; variables of a block are put in."""
    found = []
    for block in blocks(page, 'bash'):
        variables = {}
        for line in block.replace('\\\n', ' ').splitlines():
            line = re.sub(r'^until (.*?);.*', r'\1', line.replace('...', ''))
            words = shlex.split(line, comments=True)
            while words and re.match(r'\w+=', words[0]):
                name, _, value = words.pop(0).partition('=')
                variables[f'${name}'] = value
            if words:
                found.append([variables.get(word, word) for word in words])
    return found + [shlex.split(code) for code in inline(page) if re.match(r'(python|make|tools/\S+ ) ?', code)]


@functools.cache
def tool(name: str) -> dict:
    """The names in a tool: a script by its path, or a module of benchmarks/ by its name."""
    if name.endswith('.py'):
        return runpy.run_path(str(ROOT / name))
    module = import_module(name)
    return vars(import_module(f'{name}.__main__') if hasattr(module, '__path__') else module)


def parse(name: str, arguments: list[str]) -> argparse.Namespace:
    """What a tool reads from a command line; an option that it does not have ends in SystemExit."""
    with mock.patch('sys.argv', [name, *arguments]):
        return tool(name)['parse_args']()


@functools.cache
def options() -> set[str]:
    """All options of all tools, as their help has them."""
    found = set(FOREIGN_OPTIONS)
    for name, *command in [*([name] for name in TOOLS), *(['tools/misc/own_data.py', task] for task in TASKS)]:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
            parse(name, [*command, '--help'])
        found.update(re.findall(r'(?<![\w-])--[a-z][\w-]*', printed.getvalue()))
    return found


@functools.cache
def known_keys() -> tuple:
    return tuple(load_config(str(ROOT / 'configs' / f'{name}.py')) for name in CONFIGS)


def has_key(config, key: str) -> bool:
    """Whether a config has the dict that a dotted key writes into, or the one around it, for a hook that is added."""
    for name in key.split('.')[:-2] or [key.split('.')[0]]:
        if not hasattr(config, 'get') or name not in config:
            return False
        config = config[name]
    return True


@by_page
def test_commands(page, capsys):
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
    for words in commands(page):
        program, *arguments = words
        if program == 'make':
            assert all('=' in word or word in targets for word in arguments), words
        elif program.endswith('python') and arguments[0] == '-c':
            exec(arguments[1], {})
        elif program.endswith('python'):
            name, *rest = arguments[1:] if arguments[0] == '-m' else arguments
            assert name in TOOLS if name.startswith('benchmarks.') else arguments[0] == '-m' or (ROOT / name).is_file()
            if name in TOOLS and rest:
                parse(name, [NUMBERS.get(word, word) for word in rest])
        elif program.endswith('.sh'):
            name, start = SCRIPTS[Path(program).name]
            config = start - 2 if 'slurm' in program else 0
            parse(f'tools/{name}', ['CONFIG', *(['CHECKPOINT'] * (name == 'test.py')), *arguments[start:]])
            assert len(arguments) >= start and (ROOT / program).stat().st_mode & 0o100
            assert arguments[config] in ('CONFIG', '$CONFIG') or (ROOT / arguments[config]).is_file(), words


@pytest.mark.parametrize('name', [name for name in TOOLS if name.startswith('tools/')])
def test_examples_in_help(name):
    """A tool's help gives an example that the tool accepts, on configs that exist."""
    text = tool(name)['__doc__'].replace('\\\n', ' ')
    (example, *_) = re.findall(r'^ +python (\S+) *(.*)$', text, re.M)
    arguments = shlex.split(example[1], comments=True)
    assert example[0] == name and all((ROOT / word).is_file() for word in arguments if word.startswith('configs/'))
    parse(name, arguments)


@by_page
def test_options_and_keys(page):
    texts = [*inline(page), *blocks(page, 'bash')]
    found = {word for text in texts for word in re.findall(r'(?<![\w-])--[a-z][\w-]*', text)}
    if page.name != 'experiments.md':  # speaks of other programs too
        assert found <= options()
    for text in texts:
        for key in re.findall(r'([a-z_]+(?:\.[\w]+)+)=', text.partition('--cfg-options')[2]):
            assert any(has_key(config, key) for config in known_keys()), key


@by_page
def test_files(page):
    """Also those of a pattern, such as strip-mlp-{arch}_8xb128_in1k.py."""
    folders = '|'.join(('benchmarks', 'configs', 'demo', 'docs', 'tools', 'tests', 'mmstrip', 'requirements'))
    for text in [*inline(page), *blocks(page, 'bash')]:
        text = re.sub(r'\{[^}]*\}|\bNAME\b', '*', text)
        for name in re.findall(rf'(?<![\w./-])(?:{folders})/[\w./*-]*[\w*]', text):
            assert list(ROOT.glob(name)), name
        for name in re.findall(
            r'(?<![\w./:*-])[a-z][\w-]*strip-mlp-[\w.-]*\.py|(?<![\w./:*-])strip-mlp-[\w.-]*\.py', text
        ):
            assert list(ROOT.glob(f'configs/*/{name}')), name


def headings(page: Path) -> set[str]:
    """Anchors as code hosts make them."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    lines = re.findall(r'^#+ (.*)$', text, re.M)
    return {re.sub(r'[^\w -]', '', line.lower()).replace(' ', '-') for line in lines}


@by_page
def test_links(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        name, _, anchor = link.partition('#')
        if '://' in link:
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_errors_are_those_of_the_code():
    """What users search the page for is in a string of the package."""
    trees = (ast.parse(path.read_text()) for path in ROOT.glob('mmstrip/**/*.py'))
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    strings = '\n'.join(node.value for node in nodes if isinstance(node.value, str))
    titles = re.findall(r'\*\*`([^`]+)`\*\*', (ROOT / 'docs' / 'faq.md').read_text())
    own = [title for title in titles if not title.startswith(FOREIGN_ERRORS)]
    assert len(own) >= 6
    for title in own:
        for part in re.sub(r'^\w+Error: ', '', title).split('...'):
            assert part.strip() in strings, title


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A folder with the checkpoint of a classifier, by the name that the pages give it, and a picture."""
    folder = tmp_path_factory.mktemp('docs')
    config = load_config(str(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py'))
    (folder / 'checkpoints').mkdir()
    weights = {
        key: torch.zeros(value.shape, dtype=value.dtype) for key, value in build_model(config).state_dict().items()
    }
    torch.save(dict(state_dict=weights), folder / 'checkpoints' / 'strip-mlp-tiny_in1k.pth')
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / 'picture.jpg')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    return folder


class Inferencer:
    """Stands in for a detector's, of which a page shows a line."""

    def __init__(self, config, checkpoint, device='cuda'):
        self.model = torch.nn.Linear(1, 1)

    def __call__(self, images, out_dir=''):
        return self.model(torch.zeros(1, 1))


@by_page
def test_python(page, checkpoint, monkeypatch, capsys):
    """The blocks of a page in turn, in one namespace; those that are configs are built."""
    monkeypatch.chdir(checkpoint)
    for name in ('mmdet.apis.DetInferencer', 'mmseg.apis.MMSegInferencer'):  # the real ones: test_toolboxes.py
        monkeypatch.setattr(name, Inferencer)
    names = dict(DetInferencer=Inferencer, config=None, checkpoint=None, images=None)
    for block in blocks(page, 'python'):
        if '_base_' not in block:
            exec(block, names)
    if 'backbone' in names:
        with torch.device('meta'):
            assert MODELS.build(names['backbone']).out_indices == (0, 1, 2, 3)


CONFIG_BLOCKS = [(page, block) for page in PAGES for block in blocks(page, 'python') if '_base_' in block]


@pytest.mark.parametrize('page, block', CONFIG_BLOCKS, ids=lambda value: getattr(value, 'stem', None))
def test_configs_of_users(page, block, tmp_path, monkeypatch):
    if 'mmdet::' in block:
        return  # built, trained and tested in test_configs/test_dense_models.py
    (tmp_path / 'mine.py').write_text(block.replace("'./", f"'{page.parent}/"))
    config = load_config(str(tmp_path / 'mine.py'))
    model = build_model(config)
    assert not hasattr(model, 'head') or model.head.in_channels == 8 * model.backbone.embed_dims
