"""The site of the documentation, and the notebook in it."""

import json
import os
import re

import pytest
from helpers import ROOT
from helpers.runs import call_tool
from sphinx.cmd.build import main as build

NOTEBOOK = ROOT / 'demo' / 'tutorial.ipynb'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Built as `make docs` does; broken links and references are errors."""
    folder = tmp_path_factory.mktemp('site')
    assert build(['-q', '--fail-on-warning', '--keep-going', '-c', str(ROOT / 'docs'), str(ROOT), str(folder)]) == 0
    return folder


def test_every_page_is_in_the_site(site):
    pages = [*ROOT.glob('docs/*.md'), *ROOT.glob('docs/api/*.rst'), *ROOT.glob('configs/*/README.md'), NOTEBOOK]
    pages += [ROOT / name for name in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md')]
    index = (site / 'index.html').read_text()
    for page in pages:
        name = page.relative_to(ROOT).with_suffix('.html')
        assert (site / name).is_file() and (f'href="{name}"' in index or page.name == 'README.md'), name
    assert 'strip' in (site / 'searchindex.js').read_text()


def test_links_to_files_lead_to_them(site):
    page = (site / 'docs' / 'model_zoo.html').read_text()
    link = re.search(r'href="(\S*/strip-mlp-tiny_8xb128_in1k\.py)"', page)[1]
    assert (site / 'docs' / link).read_text() == (ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py').read_text()


def test_docstrings_of_the_public_names_are_in_the_site(site):
    for page, name in (
        ('models', 'mmstrip.models.StripMLP'),
        ('accelerate', 'mmstrip.accelerate'),
        ('own_data', 'mmstrip.own_data.write_detection'),
        ('deployment', 'mmstrip.deployment.load'),
        ('engine', 'mmstrip.engine.hooks.AccelerateHook'),
    ):
        assert f'id="{name}"' in (site / 'docs' / 'api' / f'{page}.html').read_text(), name


def test_the_notebook_is_stored_with_its_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']
    outputs = [output for cell in cells for output in cell['outputs']]
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 4
    assert not any(output['output_type'] == 'error' or output.get('name') == 'stderr' for output in outputs)
    assert os.path.getsize(NOTEBOOK) < 500e3


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    run = call_tool(ROOT / 'tests/helpers/notebook.py', NOTEBOOK, folder=tmp_path, env=dict(TMPDIR=str(tmp_path)))
    assert run.returncode == 0, run.stdout[-3000:]
    before, after = map(float, re.findall(r'([\d.]+)% of .*test digits', run.stdout))
    assert before > 90 and after > 60
    assert 'starts from the weights of the classifier: True' in run.stdout
    exported, own = (re.search(rf'^{name}: *(\[.*\])$', run.stdout, re.M)[1] for name in ('exported', 'PyTorch'))
    assert exported == own
