"""Reading and inspecting config files."""

import argparse
import difflib
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

# Settings that are dicts if they are there.
_DICTS = (
    *(f'{stage}_{part}' for stage in ('train', 'val', 'test') for part in ('cfg', 'dataloader', 'dataloader.sampler')),
    *('model', 'optim_wrapper', 'randomness', 'auto_scale_lr', 'env_cfg', 'env_cfg.mp_cfg', 'env_cfg.dist_cfg'),
    *('default_hooks', 'default_hooks.checkpoint', 'default_hooks.runtime_info'),
)


class _KeyValues(DictAction):
    def __call__(self, parser: argparse.ArgumentParser, namespace, values: list[str], option_string=None) -> None:
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'{option_string} takes KEY=VALUE, but got {wrong[0]!r}')
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser, what: str = 'the config') -> None:
    """Add the option ``--cfg-options``, which overrides entries of ``what``."""
    parser.add_argument(
        '--cfg-options', nargs='+', action=_KeyValues, metavar='KEY=VALUE', help=f'override entries of {what}'
    )


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config file and override entries by ``options``, values by dotted key like ``--cfg-options``.

    Raises:
        FileNotFoundError: There is no such file; the error suggests similar names.
        ValueError: The file cannot be read as a config, ``options`` do not fit it, or a setting must be a dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no config at {path}' + _suggestion(Path(path)))
    try:
        config = Config.fromfile(path)
    except ImportError:  # of a toolbox
        raise
    except Exception as error:  # a config is a program
        raise ValueError(f'{path} cannot be read as a config: {type(error).__name__}: {error}') from error
    if options:
        try:
            config.merge_from_dict(options)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f'--cfg-options do not fit {path}: {" ".join(map(str, error.args))[:200]}') from error
    _check_kinds(config, path)
    return config


def _check_kinds(config: Config, path: str) -> None:
    """Check that dicts are dicts and pipelines lists."""
    for key in _DICTS:
        value = setting(config, key)
        if not isinstance(value or {}, dict):
            raise ValueError(f'{path}: {key} must be a dict, but is {value!r}')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for key, dataset in leaf_datasets(config, f'{loader}.dataset'):
            if not isinstance(dataset.get('pipeline') or [], (list, tuple)):
                raise ValueError(f'{path}: {key}.pipeline must be a list, but is {dataset["pipeline"]!r}')


def load_model_config(path: str, options: dict | None = None) -> Config:
    """Read a config file with a model (:func:`load_config`) and make its default scope current.

    Raises:
        FileNotFoundError, ValueError: See :func:`load_config`.
        ValueError: The config has no ``model``.
    """
    config = load_config(path, options)
    if not config.get('model'):
        raise ValueError(f'{path} has no model')
    init_default_scope(config.get('default_scope') or 'mmengine')
    return config


def build_model(config: dict) -> nn.Module:
    """Build a model of any toolbox.

    Raises:
        ValueError: The type is not registered, or its arguments do not fit.
    """
    try:
        return MODELS.build(config)
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = ' '.join(map(str, error.args)).strip() or type(error).__name__
        raise ValueError(f'{config.get("type")} cannot be built: {reason}') from error


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f': folder {path.parent} does not exist'
    names = [file.name for file in path.parent.glob('*.py')]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def setting(config: dict, key: str, default: object = None) -> object:
    """The setting at a dotted key; ``default`` if it is missing or what is around it is no dict."""
    *parents, name = key.split('.')
    for parent in parents:
        config = config.get(parent)
        if not isinstance(config, dict):
            return default
    return config.get(name, default)


def leaf_datasets(config: dict, key: str) -> Iterator[tuple[str, dict]]:
    """The datasets at a dotted key, inside wrappers such as RepeatDataset and ConcatDataset, with their own keys."""
    yield from _leaves(setting(config, key), key)


def _leaves(dataset: object, key: str) -> Iterator[tuple[str, dict]]:
    if isinstance(dataset, (list, tuple)):
        for i, item in enumerate(dataset):
            yield from _leaves(item, f'{key}.{i}')
    elif isinstance(dataset, dict):
        inner = [name for name in ('dataset', 'datasets') if name in dataset]
        for name in inner:
            yield from _leaves(dataset[name], f'{key}.{name}')
        if not inner:
            yield key, dataset


def dataset_class(dataset: dict) -> type | None:
    """The class that a dataset's config names or holds; None if no toolbox registers the name."""
    kind = dataset['type']
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return kind


def name_of(kind: str | type) -> str:
    """The name of a config's ``type``, which is a string with or without scope or module, or a class.

    mmengine's own types lose their module; others keep their scope or the module of their class.
    """
    if isinstance(kind, str):
        return kind.rpartition('.')[2] if kind.startswith('mmengine.') else kind
    return kind.__name__ if kind.__module__.startswith('mmengine.') else f'{kind.__module__}.{kind.__name__}'


def bare_name(config: dict) -> str:
    """The name of a config's ``type`` without scope or module."""
    return name_of(config.get('type') or '').rpartition('.')[2]
