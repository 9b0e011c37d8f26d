"""Packaging of mmstrip: `pip install .` packs configs, tools and model-index.yml under mmstrip/.mim, the place where
OpenMMLab packages keep them, so that other projects can inherit `mmstrip::` configs."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIM = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Fill mmstrip/.mim: copies in a wheel, links in an editable install."""

    def run(self) -> None:
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / 'mmstrip' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in MIM:
            if self.editable_mode:
                (target / name).symlink_to((ROOT / name).resolve())
            elif (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(ROOT / name, target / name)


def requirements(name: str) -> list:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


def version() -> str:
    scope: dict = {}
    exec((ROOT / 'mmstrip' / 'version.py').read_text(), scope)
    return scope['__version__']


EXTRAS = {name: requirements(name) for name in ('mminstall', 'classification', 'detection', 'segmentation', 'tests')}

setup(
    name='mmstrip',
    version=version(),
    description='Strip-MLP (ICCV 2023) as an OpenMMLab backbone',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=('mmstrip', 'mmstrip.*')),
    install_requires=requirements('runtime'),
    extras_require={**EXTRAS, 'all': [line for lines in EXTRAS.values() for line in lines]},
    cmdclass={'build_py': BuildWithMim},
)
