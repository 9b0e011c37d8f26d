"""What imports what, and when."""

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import ROOT, python
from mmengine.registry import DATASETS

# A module imports from lower lines alone, or from its own package.
LAYERS = (
    ('tools', 'benchmarks'),
    ('analysis', 'own_data'),
    ('converters', 'deployment'),
    ('engine',),
    ('datasets', 'ops'),
    ('models',),
    ('csrc', 'utils', 'zoo'),
    ('registry', 'version'),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [path for folder in ('mmstrip', 'tools', 'benchmarks') for path in ROOT.glob(f'{folder}/**/*.py')]
TOOLBOXES = ('mmpretrain', 'mmdet', 'mmseg')


def part_of(path: Path) -> str:
    return part(path.relative_to(ROOT).with_suffix('').parts)


def part(names: Sequence[str]) -> str:
    """The package below mmstrip (or the module in it) of a dotted name; else the folder beside mmstrip."""
    return names[1] if names[0] == 'mmstrip' else names[0]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of the modules of mmstrip and benchmarks that a file imports, anywhere in it but for its types."""
    package = path.relative_to(ROOT).parent.parts
    found, tree = set(), ast.parse(path.read_text())
    tree.body = [node for node in tree.body if 'TYPE_CHECKING' not in ast.unparse(getattr(node, 'test', []))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            source = '.'.join([*above, *filter(None, [node.module])])
            found |= {f'{source}.{alias.name}' for alias in node.names}
    return {name for name in found if name.startswith(('mmstrip.', 'benchmarks.'))}


def upward_imports(path: Path) -> list[str]:
    own = part_of(path)
    parts = {part(name.split('.')) for name in imported_modules(path)} & set(LEVELS)
    upward = [name for name in parts if name != own and LEVELS[name] <= LEVELS[own]]
    return [f'{path.relative_to(ROOT)} imports {name}' for name in upward]


def test_no_import_runs_upwards():
    files = [path for path in FILES if path != ROOT / 'mmstrip' / '__init__.py']
    assert {part_of(path) for path in files} <= set(LEVELS), 'a package without a level'
    assert not [words for path in files for words in upward_imports(path)]


def test_the_package_itself_imports_its_version_alone():
    assert imported_modules(ROOT / 'mmstrip' / '__init__.py') == {'mmstrip.version.__version__'}


def test_relative_imports_are_seen():
    """Or the test above would see nothing."""
    hook = ROOT / 'mmstrip' / 'engine' / 'hooks' / 'seed.py'
    assert imported_modules(hook) >= {'mmstrip.registry.HOOKS', 'mmstrip.engine.sampler.seed_all'}
    assert 'mmstrip.utils.config.load_config' in imported_modules(ROOT / 'tools' / 'train.py')
    assert 'mmstrip.hooks.seed' not in imported_modules(ROOT / 'mmstrip' / 'engine' / '__init__.py')


def test_the_backbone_needs_mmengine_and_mmcv_alone(tmp_path):
    """No toolbox, no compiled operators of mmcv, nothing that draws, and no word of warning."""
    blocked = ('sklearn', 'matplotlib', 'torchvision', *TOOLBOXES, 'mmcv.ops')
    done = python(
        f'import sys; sys.modules.update(dict.fromkeys({blocked}))\n'
        'from mmstrip.models import StripMLP\n'
        "print(StripMLP('tiny-light', img_size=32).embed_dims)",
        cwd=tmp_path,
        env=dict(PYTHONWARNINGS='error,ignore::DeprecationWarning:torch.jit._script'),  # mmengine meets it
    )
    assert done.stdout == '80\n', done.stdout


EXTRAS = {
    'sklearn': ('import mmstrip.engine, mmstrip.datasets.digit_split', 'the digits come with scikit-learn'),
    'matplotlib': ('import mmstrip.engine', 'plots need matplotlib'),
}
HIDE = f"""
import os, sys
import mmengine.registry
for hidden, (use, _) in {EXTRAS}.items():
    child = os.fork()
    if not child:
        sys.modules[hidden] = None
        try:
            exec(use)
        except ImportError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_extras_are_named_where_they_are_missing(tmp_path):
    """Trainings need no scikit-learn, but on digits."""
    done = python(HIDE, cwd=tmp_path)
    errors = [line for line in done.stdout.split('\n') if 'not installed' in line]
    assert errors == [
        f"{words}, which is not installed: pip install 'mmstrip[tools]'" for _, words in EXTRAS.values()
    ], done.stdout


LOOKUPS = {
    'mmengine': ('PlaceDigit', 'ToPlanes', 'SeededSampler', 'block_sigterm_in_worker'),
    'mmpretrain': ('Digits', 'Caltech101', 'RandAugment'),
}
LOOK_UP = f"""
import os, sys
from importlib import import_module
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS, TRANSFORMS
registries = DATA_SAMPLERS, DATASETS, FUNCTIONS, TRANSFORMS
for toolbox, names in {LOOKUPS}.items():
    child = os.fork()  # which knows as much as a fresh process, but PyTorch and mmengine
    if not child:
        models = import_module(f'{{toolbox}}.registry').MODELS
        import_module(f'{{toolbox}}.dataset' + 's' * (toolbox != 'mmengine'))
        assert 'mmstrip' not in sys.modules
        model = models.build(dict(type='mmstrip.StripMLP', arch='tiny-light', img_size=32))
        before = set(sys.modules)
        classes = [next(filter(None, (registry.get(f'mmstrip.{{name}}') for registry in registries))) for name in names]
        others = [name for name in {(*TOOLBOXES, 'triton', 'torch._inductor')} if name in set(sys.modules) - before]
        print(toolbox, *(kind.__name__ for kind in (type(model), *classes)), others, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_names_are_found_where_mmstrip_was_not_imported_and_import_their_toolbox_alone(tmp_path):
    """And what that toolbox itself imports; no compiler of GPUs."""
    for path in ROOT.glob('mmstrip/datasets/*.py'):
        assert len(set(re.findall(rf'^(?:from|import) ({"|".join(TOOLBOXES)})', path.read_text(), re.M))) <= 1
    done = python(LOOK_UP, cwd=tmp_path)
    for toolbox, names in LOOKUPS.items():
        assert f'{toolbox} StripMLP {" ".join(names)} []\n' in done.stdout, done.stdout


def test_a_toolbox_that_fails_says_so(monkeypatch):
    """With its own error, not as a name that is not registered."""
    module = ModuleType('mmstrip.datasets.coco')
    module.__getattr__ = lambda name: np.long_gone  # as toolboxes of another NumPy fail
    monkeypatch.setitem(sys.modules, 'mmstrip.datasets.coco', module)
    with pytest.raises(AttributeError, match='long_gone'):
        DATASETS.get('mmstrip.CocoDataset')
    assert DATASETS.get('mmstrip.NoDataset') is None
