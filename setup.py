"""Packaging of mmstrip: `pip install .` packs configs, tools and model-index.yml under mmstrip/.mim, the place where
OpenMMLab packages keep them, so that other projects can inherit `mmstrip::` configs.

Compiled operators come along where PyTorch and a C++ compiler are at hand (`pip install --no-build-isolation` sees the
PyTorch that is installed). Without them the package is whole too, only slower on CPUs."""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
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


def native() -> dict:
    """The compiled operators as arguments of setup; none without PyTorch, or with MMSTRIP_NATIVE=0."""
    operators = ROOT / 'mmstrip' / 'ops'
    if os.environ.get('MMSTRIP_NATIVE') == '0':
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        say_none('PyTorch is not installed')
        return {}
    library = runpy.run_path(str(operators / 'extension.py'))
    extensions = [
        CppExtension(
            f'mmstrip.ops.{library["library_name"](variant)}',
            [str(path.relative_to(ROOT)) for path in library['SOURCES']],
            depends=[str(path.relative_to(ROOT)) for path in library['HEADERS']],
            extra_compile_args=library['compile_flags'](variant),
            extra_link_args=library['link_flags'](),
        )
        for variant in library['VARIANTS']
    ]

    class BuildNative(BuildExtension):
        """Skips the operators where they cannot be compiled."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                say_none(str(error).strip().split('\n')[0])
                self.extensions = self.distribution.ext_modules = []
                if wheel := self.distribution.get_command_obj('bdist_wheel', create=False):
                    wheel.root_is_pure = True  # for any platform

        def _define_torch_extension_name(self, extension) -> None:
            """Left out: nobody reads it, and files would be compiled again as the name changes with any of them."""

        def build_extension(self, extension) -> None:
            """Objects of each library in a folder of its own, as all are of the same sources."""
            folder, self.build_temp = self.build_temp, str(Path(self.build_temp) / extension.name.split('_torch')[0])
            super().build_extension(extension)
            self.build_temp = folder

    return dict(ext_modules=extensions, cmdclass={'build_ext': BuildNative})


def say_none(reason: str) -> None:
    print(
        f'mmstrip: no compiled operators, it works without them, slower on CPUs ({reason})', file=sys.stderr, flush=True
    )


def requirements(name: str) -> list:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


def version() -> str:
    scope: dict = {}
    exec((ROOT / 'mmstrip' / 'version.py').read_text(), scope)
    return scope['__version__']


NATIVE = native()
TOOLBOXES = ('classification', 'detection', 'segmentation')
EXTRAS = {name: requirements(name) for name in ('mminstall', 'tools', 'deployment', 'demo', 'docs', 'tests')}
EXTRAS.update({name: requirements(name) + EXTRAS['tools'] + EXTRAS['mminstall'] for name in TOOLBOXES})

setup(
    name='mmstrip',
    version=version(),
    description='Strip-MLP (ICCV 2023) as an OpenMMLab backbone',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='Strip-MLP, vision backbone, OpenMMLab, mmpretrain, mmdetection, mmsegmentation',
    project_urls={'Paper': 'https://arxiv.org/abs/2307.11458'},
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=('mmstrip', 'mmstrip.*')),
    install_requires=requirements('runtime'),
    extras_require={**EXTRAS, 'all': sorted({line for lines in EXTRAS.values() for line in lines})},
    package_data={'mmstrip': ['py.typed'], 'mmstrip.ops': ['csrc/*.cpp', 'csrc/*.h']},
    ext_modules=NATIVE.get('ext_modules', []),
    cmdclass={'build_py': BuildWithMim, **NATIVE.get('cmdclass', {})},
)
