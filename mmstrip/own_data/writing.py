"""Shared by the writers of all three tasks: the backbone, the text of the config, and reading it back."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from pprint import pformat
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import DATASETS

from ..models import StripMLP
from ..models.arguments import check, is_positive_int
from ..models.state_dict import recognize_backbone
from ..utils.checkpoints import read_checkpoint, weights_in
from ..utils.files import write_file
from .folders import Folder, is_single_line

WIDTH = 110
LOADER = """\
{0}_dataloader = dict({2}
    dataset=dict(
        ${0},
        pipeline={1}_pipeline,
        **data,
    ),
)
"""
BATCH_SIZE = '\n    batch_size=batch_size,'
LOADERS = LOADER.format('train', 'train', BATCH_SIZE) + ''.join(
    LOADER.format(part, 'test', '') for part in ('val', 'test')
)
SUBSTITUTED = '{{'  # mmengine replaces what follows, e.g. with environment variables


class Written(NamedTuple):
    """Result of the functions of this package."""

    config: Path
    found: list[str]  # what was found in the folder, one sentence each


class Backbone(NamedTuple):
    """A backbone in a config."""

    name: str  # in that of the config
    arch: str | dict
    others: dict  # further arguments that the checkpoint determines
    init_cfg: dict | None  # None: random weights

    @property
    def channels(self) -> list[int]:
        """Channels of the four stages."""
        arch = StripMLP.arch_zoo[self.arch] if isinstance(self.arch, str) else self.arch
        return [arch['embed_dims'] * 2**stage for stage in range(4)]

    def arguments(self, **more) -> dict:
        """Arguments of the backbone in a config; what the checkpoint determines overrides ``more``."""
        arch = self.arch if isinstance(self.arch, str) else dict(_delete_=True, **self.arch)  # the base has a name
        return dict(arch=arch, **(more | self.others))


def choose_backbone(arch: str | None, init: str | Path | None) -> Backbone:
    """The requested arch, or that of a checkpoint.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The arch is unknown, or the checkpoint has no Strip-MLP or one of another arch.
    """
    if arch is not None and arch not in StripMLP.arch_zoo:
        raise ValueError(f'arch must be one of {", ".join(StripMLP.arch_zoo)}, but got {arch!r}')
    if init is None:
        name = arch or 'tiny-light'
        return Backbone(name, name, {}, None)
    weights = weights_in(read_checkpoint(init))
    try:
        prefix, settings, others = recognize_backbone(weights)
    except ValueError as error:
        raise ValueError(f'init: {init}: {error}') from error
    except (ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f'init: {init}: its Strip-MLP is incomplete: {error!r}') from error
    name = next((name for name, known in StripMLP.arch_zoo.items() if known == settings), None)
    if arch not in (None, name):
        raise ValueError(f'init: {init} has arch {name or settings}, but arch is {arch!r}; leave one of them out')
    init_cfg = dict(type='Pretrained', checkpoint=str(init), **(dict(prefix=prefix) if prefix else {}))
    return Backbone(name or 'custom', name or settings, others, init_cfg)


def check_positive(**arguments: int | None) -> None:
    """Raise ValueError for an argument that is neither None nor a positive int."""
    for name, value in arguments.items():
        check(value is None or is_positive_int(value), name, value, 'a positive int')


def to_python(value: object) -> str:
    """A value as Python source that a config, and mmengine's dump of the config, evaluate to the same value.

    Raises:
        ValueError: mmengine would change a name or path, or it does not fit on a line of UTF-8.
    """
    if isinstance(value, Path):
        path = value.as_posix()
        return to_python(f'./{path}' if path.startswith('~') else path)  # mmpretrain expands ~
    if isinstance(value, str) and (SUBSTITUTED in value or not is_single_line(value)):
        raise ValueError(
            f'{value!r} has {SUBSTITUTED}, a line break or invalid UTF-8, which configs cannot hold; rename it'
        )
    if isinstance(value, dict):
        return f'dict({", ".join(f"{name}={to_python(part)}" for name, part in value.items())})'
    if isinstance(value, list):
        [to_python(item) for item in value]
        return pformat(value, width=WIDTH, compact=True)
    return repr(value)


def fill(template: str, values: dict) -> str:
    """Replace ``$name`` by values; a ``$name`` on its own line takes the items of a dict, one line each."""

    def text(match: re.Match) -> str:
        indent, line, name = match.groups()
        value = values[line or name]
        if line and isinstance(value, dict):
            return ''.join(f'{indent}{key}={to_python(part)},\n' for key, part in value.items())
        return f'{indent}{to_python(value)},\n' if line else to_python(value)

    return re.sub(r'^( *)\$(\w+),\n|\$(\w+)', text, template, flags=re.MULTILINE)


class SplitFiles(NamedTuple):
    """A split in a config."""

    images: dict[Path, object]  # each with its annotation
    annotations: Path | list[str] | dict  # file that the dataset reads, or the content of one to write: lines or JSON
    arguments: dict = {}  # of the dataset, which locate the images


def write_config(
    data: Folder,
    name: str,
    template: str,
    parts: dict[str, SplitFiles],
    read: Callable,
    unused: str = 'images',
    **values,
) -> Path:
    """Write a config and the files beside it to ``data.out``, each atomically.

    Nothing is written if a value cannot stand in a config. The config is read back like in training; differences
    between its datasets and the folder are noted.

    Args:
        name: Start of the config's name.
        template: See :func:`fill`; ``$loaders`` stands for the three dataloaders.
        read: Returns an image's annotation from a sample of a dataset and its class names.
        unused: What to call images that a dataset drops.
        **values: Of the template. ``classes`` goes to a file if mmengine would change a name in the config or in its
            dump in a work dir.

    Raises:
        OSError: A file cannot be written.
        ValueError: A value cannot stand in a config.
    """
    config, files, datasets = data.out / f'{name}_{data.out.name}.py', {}, {}
    for split, part in parts.items():
        file = part.annotations
        if not isinstance(file, Path):
            file = data.out / f'{split}.{"json" if isinstance(file, dict) else "txt"}'
            files[file] = part.annotations
        datasets[split] = dict(ann_file=file, **part.arguments)
    if any(SUBSTITUTED in name for name in values['classes']):
        file = data.out / 'class_names.txt'
        files[file], values['classes'] = values['classes'], file
    to_python(config)  # the Runner writes its name into the config
    text = fill(template.replace('$loaders\n', LOADERS), values | {'test': datasets['val']} | datasets)
    data.out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        lines = json.dumps(content) if isinstance(content, dict) else ''.join(f'{line}\n' for line in content)
        write_file(file, lambda opened, lines=lines: opened.write(lines.encode()))
    write_file(config, lambda opened: opened.write(text.encode()))
    loaded = Config.fromfile(config)
    for split, part in parts.items():
        given = _read_dataset(loaded[f'{split}_dataloader'].dataset, read)
        lacking = [image for image in part.images if image not in given]
        differing = [image for image, own in part.images.items() if given.get(image, own) != own]
        data.note_items(f'{split}: {len(lacking)} {unused} are not trained on', lacking)
        data.note_items(f'{split}: {len(differing)} images are not trained on as found', differing)
    return config


def _read_dataset(settings: dict, read: Callable) -> dict[Path, object]:
    """Read each image and its annotation from a dataset."""
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's API prints
        dataset = DATASETS.build(dict(settings, pipeline=[], serialize_data=False))
    samples = (dataset.get_data_info(i) for i in range(len(dataset)))
    return {Path(sample['img_path']): read(sample, dataset.metainfo['classes']) for sample in samples}
