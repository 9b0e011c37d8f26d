"""What the writers of all three tasks share: the backbone, the config's text, and reading back what was written."""

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
from ..models.state_dict import recognise_backbone
from ..utils.checkpoints import read_checkpoint, weights_in
from ..utils.files import write_file
from .folders import Folder, is_line

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
SUBSTITUTED = '{{'  # mmengine replaces what follows, with values of the environment among others


class Written(NamedTuple):
    """What a function of this package has written.

    Attributes:
        config: The config.
        found: What was found in the folder, a sentence each.
    """

    config: Path
    found: list[str]


class Backbone(NamedTuple):
    """A backbone in a config.

    Attributes:
        name: What the config is called by.
        arch: Name of an arch, or a dict, as of ``StripMLP``.
        others: Further arguments that a checkpoint decides.
        init_cfg: The weights it starts from; None: random ones.
    """

    name: str
    arch: str | dict
    others: dict
    init_cfg: dict | None

    @property
    def channels(self) -> list[int]:
        """Of its four stages."""
        arch = StripMLP.arch_zoo[self.arch] if isinstance(self.arch, str) else self.arch
        return [arch['embed_dims'] * 2**stage for stage in range(4)]

    def arguments(self, **more) -> dict:
        """Its arguments in a config; those in ``more`` give way to what the checkpoint decides."""
        arch = self.arch if isinstance(self.arch, str) else dict(_delete_=True, **self.arch)  # the base has a name
        return dict(arch=arch, **(more | self.others))


def choose_backbone(arch: str | None, init: str | Path | None) -> Backbone:
    """The arch that is asked for, or that of a checkpoint.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The arch is not known, the checkpoint has no Strip-MLP in it, or another one.
    """
    if arch is not None and arch not in StripMLP.arch_zoo:
        raise ValueError(f'arch must be one of {", ".join(StripMLP.arch_zoo)}, but got {arch!r}')
    if init is None:
        name = arch or 'tiny-light'
        return Backbone(name, name, {}, None)
    weights = weights_in(read_checkpoint(init))
    try:
        prefix, settings, others = recognise_backbone(weights)
    except ValueError as error:
        raise ValueError(f'init: {init}: {error}') from error
    except (ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f'init: {init}: it has no whole Strip-MLP: {error!r}') from error
    name = next((name for name, known in StripMLP.arch_zoo.items() if known == settings), None)
    if arch not in (None, name):
        raise ValueError(f'init: {init} is of arch {name or settings}, but {arch} is asked for')
    init_cfg = dict(type='Pretrained', checkpoint=str(init), **(dict(prefix=prefix) if prefix else {}))
    return Backbone(name or 'custom', name or settings, others, init_cfg)


def check_positive(**arguments: int | None) -> None:
    """Raises ValueError for one that is given and not positive."""
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(f'{name} must be positive, but got {value}')


def python(value) -> str:
    """A value as Python that a config reads as this very value, and so does mmengine's dump of the config.

    Raises:
        ValueError: A name or path would be changed by mmengine, or not fit in a line of UTF-8.
    """
    if isinstance(value, Path):
        path = value.as_posix()
        return python(f'./{path}' if path.startswith('~') else path)  # mmpretrain takes ~ for a home
    if isinstance(value, str) and (SUBSTITUTED in value or not is_line(value)):
        raise ValueError(f'{value!r} has {SUBSTITUTED}, a line break or no UTF-8, which configs cannot hold; rename it')
    if isinstance(value, dict):
        return f'dict({", ".join(f"{name}={python(part)}" for name, part in value.items())})'
    if isinstance(value, list):
        [python(item) for item in value]
        return pformat(value, width=WIDTH, compact=True)
    return repr(value)


def fill(template: str, values: dict) -> str:
    """Put values in the place of ``$name``; where that has a line of its own, the parts of a dict, a line each."""

    def text(match: re.Match) -> str:
        indent, line, name = match.groups()
        value = values[line or name]
        if line and isinstance(value, dict):
            return ''.join(f'{indent}{key}={python(part)},\n' for key, part in value.items())
        return f'{indent}{python(value)},\n' if line else python(value)

    return re.sub(r'^( *)\$(\w+),\n|\$(\w+)', text, template, flags=re.MULTILINE)


class Part(NamedTuple):
    """What a config says of a split.

    Attributes:
        images: Each image with what belongs to it.
        annotations: The file that its dataset reads, or what to write into one: lines, or JSON.
        place: Further arguments of its dataset, which say where the images are.
    """

    images: dict[Path, object]
    annotations: Path | list[str] | dict
    place: dict = {}


def write_config(
    data: Folder, name: str, template: str, parts: dict[str, Part], read: Callable, unused: str = 'images', **values
) -> Path:
    """Write a config and the files beside it, each atomically; nothing where a value cannot be kept.

    It is read back as the tools do: where its datasets differ from what was found is noted.

    Args:
        data: The folder, which knows where the config goes.
        name: What the config's name begins with.
        template: The config as :func:`fill` takes it, with ``$loaders`` for the three loaders.
        parts: The splits.
        read: Gives what belongs to an image, of a sample of a dataset and the names of its classes.
        unused: What to call images that a dataset leaves out.
        **values: The values. ``classes`` is written to a file where mmengine would change a name, in the config or in
            the dump of it in a work dir.

    Raises:
        OSError: A file cannot be written.
        ValueError: A value cannot stand in a config.
    """
    config, files, places = data.out / f'{name}_{data.out.name}.py', {}, {}
    for split, part in parts.items():
        file = part.annotations
        if not isinstance(file, Path):
            file = data.out / f'{split}.{"json" if isinstance(file, dict) else "txt"}'
            files[file] = part.annotations
        places[split] = dict(ann_file=file, **part.place)
    if any(SUBSTITUTED in name for name in values['classes']):
        file = data.out / 'class_names.txt'
        files[file], values['classes'] = values['classes'], file
    python(config)  # the Runner writes its name into the config
    text = fill(template.replace('$loaders\n', LOADERS), values | {'test': places['val']} | places)
    data.out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        lines = json.dumps(content) if isinstance(content, dict) else ''.join(f'{line}\n' for line in content)
        write_file(file, lambda opened, lines=lines: opened.write(lines.encode()))
    write_file(config, lambda opened: opened.write(text.encode()))
    loaded = Config.fromfile(config)
    for split, part in parts.items():
        given = _given(loaded[f'{split}_dataloader'].dataset, read)
        lacking = [image for image in part.images if image not in given]
        differing = [image for image, own in part.images.items() if given.get(image, own) != own]
        data.note_items(f'{split}: {len(lacking)} {unused} are not trained on', lacking)
        data.note_items(f'{split}: {len(differing)} images are not trained on as they were found', differing)
    return config


def _given(settings: dict, read: Callable) -> dict[Path, object]:
    """What a dataset gives of each image."""
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's API prints
        dataset = DATASETS.build(dict(settings, pipeline=[], serialize_data=False))
    samples = (dataset.get_data_info(i) for i in range(len(dataset)))
    return {Path(sample['img_path']): read(sample, dataset.metainfo['classes']) for sample in samples}
