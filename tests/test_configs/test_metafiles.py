"""READMEs list every config with its figures, metafiles what has results."""

import modelindex
import pytest
from helpers import ROOT
from helpers.configs import ARCHS, COMPARED, CONFIGS, DENSE, LISTED
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmstrip.analysis.complexity import analyze_complexity


def test_metafiles_are_valid():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert all((ROOT / model.config).is_file() and model.results for model in index.models)
    names = {model.name for model in index.models}
    assert {f'strip-mlp-{arch}_3rdparty_in1k' for arch in ARCHS} <= names


@pytest.mark.parametrize('arch', ARCHS)
def test_sizes_of_the_paper_s_variants(arch):
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    (listed,) = [model for model in index.models if model.name == f'strip-mlp-{arch}_3rdparty_in1k']
    config = Config.fromfile(ROOT / listed.config)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == listed.metadata.parameters
    complexity = analyze_complexity(model, (3, 224, 224))
    assert complexity.flops == listed.metadata.flops
    assert f'{complexity.flops / 1e9:.2f}' == LISTED[listed.config]['FLOPs (G)']


def test_readmes_have_every_config():
    assert {str(path.relative_to(ROOT)) for path in CONFIGS + DENSE + COMPARED} == set(LISTED)
