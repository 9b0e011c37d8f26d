"""Metafiles and READMEs list every config, with its figures."""

import re
from pathlib import Path

import modelindex
import pytest
from helpers import ROOT
from helpers.configs import ARCHS, CONFIGS, DENSE, LISTED
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmstrip.analysis.complexity import analyze_complexity


def test_it_is_valid_and_complete():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    configs = {model.config for model in index.models}
    assert all((ROOT / config).is_file() for config in configs)
    assert {f'configs/strip_mlp/strip-mlp-{arch}_8xb128_in1k.py' for arch in ARCHS} <= configs


def test_flops_of_the_smallest():
    name = 'configs/strip_mlp/strip-mlp-tiny-light_8xb128_in1k.py'
    config = Config.fromfile(ROOT / name)
    init_default_scope(config.default_scope)
    complexity = analyze_complexity(MODELS.build(config.model), (3, 224, 224))
    assert complexity.flops == LISTED[name]['FLOPs']
    assert complexity.flops / 1e9 == pytest.approx(2.5, abs=0.05)


def test_readmes_and_metafiles_have_every_config():
    for path in CONFIGS + DENSE:
        assert f'({path.name})' in (path.parent / 'README.md').read_text(), path.name
        assert 'xb128_' not in path.name or str(path.relative_to(ROOT)) in LISTED
        assert path in CONFIGS or str(path.relative_to(ROOT)) in LISTED


def test_links_lead_somewhere():
    for readme in [ROOT / 'README.md', *ROOT.glob('configs/*/README.md'), *ROOT.glob('docs/*.md')]:
        text = readme.read_text()
        assert not [name for name in _linked(text) if not (readme.parent / name).exists()], readme


def _linked(text: str) -> list:
    return [name for name in re.findall(r'\]\(([^)#]+)\)', text) if '://' not in name and Path(name).name]
