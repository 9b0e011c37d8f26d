"""Config files: reading them, and looking into them."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config file and override parts of it.

    Args:
        path: Config file.
        options: Dotted keys and their values, as of ``--cfg-options``.

    Raises:
        FileNotFoundError: There is no such file; names that come close are proposed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no config at {path}' + _proposal(Path(path)))
    config = Config.fromfile(path)
    if options:
        config.merge_from_dict(options)
    return config


def _proposal(path: Path) -> str:
    if not path.parent.is_dir():
        return f': there is no folder {path.parent}'
    names = [file.name for file in path.parent.glob('*.py')]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def leaf_datasets(dataset, key: str) -> Iterator[tuple[str, dict]]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset, each with its dotted key."""
    if isinstance(dataset, (list, tuple)):
        for i, item in enumerate(dataset):
            yield from leaf_datasets(item, f'{key}.{i}')
    elif isinstance(dataset, dict):
        inner = [name for name in ('dataset', 'datasets') if name in dataset]
        for name in inner:
            yield from leaf_datasets(dataset[name], f'{key}.{name}')
        if not inner:
            yield key, dataset


def dataset_class(dataset: dict) -> type | None:
    """The class of a dataset's config, which names it or has it; None where no toolbox knows the name."""
    kind = dataset['type']
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return kind


def name_of(kind: str | type) -> str:
    """The name of mmengine's by which a config's ``type`` goes; it may have its scope or module, or be the class.

    Types of others keep their scope, or the module of their class.
    """
    if isinstance(kind, str):
        return kind.rpartition('.')[2] if kind.startswith('mmengine.') else kind
    return kind.__name__ if kind.__module__.startswith('mmengine.') else f'{kind.__module__}.{kind.__name__}'
