"""The pages of this repository as a site: `make docs`. Its source folder is the repository's root, so that links from
any page to any file lead to the same place here and where code is hosted."""

import pydoc
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.util.nodes import get_node_source

from mmstrip import __version__

ROOT = Path(__file__).resolve().parent.parent
CONTENTS = {
    'Start': ['install', '/demo/tutorial', 'own_data', 'datasets', 'model_zoo', 'toolboxes', 'faq'],
    'Train and deploy': ['training', 'gpu', 'dense', 'transfer', 'deployment'],
    'Recipes': [f'/configs/{task}/README' for task in ('strip_mlp', 'detection', 'segmentation', 'comparison')],
    'Look inside': ['modules', 'performance', 'results', 'receptive_field', '/benchmarks/experiments'],
    'API reference': [f'api/{name}' for name in ('models', 'accelerate', 'own_data', 'deployment', 'engine')],
    'Project': ['/CONTRIBUTING', '/CHANGELOG'],
}

project = 'mmstrip'
author = 'the authors of mmstrip'
version = release = __version__
root_doc = 'README'
include_patterns = ['*.md', 'docs/**', 'configs/*/README.md', 'benchmarks/**.md', 'demo/*.ipynb']
exclude_patterns = [
    path.name for path in ROOT.iterdir() if path.name not in ('docs', 'configs', 'benchmarks', 'demo') and path.is_dir()
]
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']

myst_heading_anchors = 4
nb_execution_mode = 'off'  # outputs are in the notebook, and a test runs it
nb_merge_streams = True

autodoc_typehints = 'none'  # docstrings say types, shapes and units
autodoc_member_order = 'bysource'
napoleon_use_param = napoleon_use_rtype = False  # types are text, not references to other projects
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(torch|numpy|mmengine|mmcv|mmpretrain|mmdet|mmseg)\b.*')]

html_theme = 'furo'
pygments_dark_style = 'github-dark'
html_title = f'mmstrip {version}'
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False


def add_contents(app, name: str, source: list[str]) -> None:
    """The README is the first page; only here does it hold the list of the others."""
    if name == root_doc:
        for caption, pages in CONTENTS.items():
            paths = [page if page[0] == '/' else f'/docs/{page}' for page in pages]
            source[0] += '\n'.join(['\n\n```{toctree}', ':hidden:', f':caption: {caption}', *paths, '```\n'])


def escape_stars(app, what, name, item, options, lines: list[str]) -> None:
    """Shapes such as (N, C, *extent) are no start of an emphasis."""
    lines[:] = [re.sub(r'(?<![\w*`])\*(?=\w)', r'\*', line) for line in lines]


def unlink_folders(app, tree: nodes.document) -> None:
    """Folders have no page: what links to one stays as text."""
    page = Path(tree['source'])
    for link in list(tree.findall(pending_xref)):
        if link['reftype'] == 'myst' and link['refdomain'] != 'doc' and (page.parent / link['reftarget']).is_dir():
            link.replace_self(link.children)


def keep_as_text(app, env, node, text) -> nodes.Node | None:
    """Python names without an entry in these pages, if there are such; Sphinx reports the others."""
    owner = (get_node_source(node) or '').partition('docstring of ')[2]
    while owner.startswith('mmstrip'):
        if pydoc.locate(node['reftarget']) or pydoc.locate(f'{owner}.{node["reftarget"]}'):
            return text
        owner = owner.rpartition('.')[0]
    return None


def add_index(app, error: Exception | None) -> None:
    """Web servers open a folder by this name."""
    if error is None:
        shutil.copy(Path(app.outdir, f'{root_doc}.html'), Path(app.outdir, 'index.html'))


def setup(app) -> None:
    app.connect('source-read', add_contents)
    app.connect('autodoc-process-docstring', escape_stars, priority=400)  # before napoleon
    app.connect('doctree-read', unlink_folders)
    app.connect('missing-reference', keep_as_text)
    app.connect('build-finished', add_index)
