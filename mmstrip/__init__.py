"""mmstrip: Strip-MLP as an OpenMMLab backbone."""

import re
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:  # what __getattr__ gives
    from . import ops as ops
    from .ops import accelerate, restore

__all__ = ['__version__', 'accelerate', 'restore']

# Oldest versions that work, and the distribution to install if there is none.
_REQUIRED = {
    'mmengine': ('0.10.0', 'onedl-mmengine'),
    'mmcv': ('2.0.0', 'onedl-mmcv'),
}


def _check_requirements() -> None:
    """Raise an ImportError that says what to install if mmengine or mmcv is missing or too old."""
    for name, (oldest, distribution) in _REQUIRED.items():
        advice = f"install it with: pip install '{distribution}>={oldest}' (or '{name}>={oldest}' from OpenMMLab)"
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f'mmstrip needs {name}>={oldest}, which is not installed; {advice}') from None
        if _release(version) < _release(oldest):
            raise ImportError(f'mmstrip needs {name}>={oldest}, but {version} is installed; {advice}')


def _release(version: str) -> tuple:
    """Major, minor and patch number: '2.0.0rc4' gives (2, 0, 0)."""
    numbers = [re.match(r'\d*', part).group() for part in version.split('.')[:3]]
    return tuple(int(number or 0) for number in numbers)


def _register_config_package() -> None:
    """Let other projects inherit mmstrip's configs, as in `_base_ = 'mmstrip::strip_mlp/...'`.

    mmengine looks packages up in its own list, where mmseg belongs to the distribution mmsegmentation. If that is not
    installed, as with the `onedl-*` continuations, the entry becomes the import name, as for mmdet and mmpretrain.
    """
    packages = import_module('mmengine.config.utils').MODULE2PACKAGE
    packages.setdefault('mmstrip', 'mmstrip')
    try:
        metadata.distribution(packages['mmseg'])
    except metadata.PackageNotFoundError:
        packages['mmseg'] = 'mmseg'


def __getattr__(name: str):
    """Import ``mmstrip.accelerate``, ``mmstrip.restore`` and ``mmstrip.ops`` on first use, as they import PyTorch."""
    if name == 'ops':
        return import_module('mmstrip.ops')
    if name in ('accelerate', 'restore'):
        return getattr(import_module('mmstrip.ops'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


_check_requirements()
_register_config_package()
