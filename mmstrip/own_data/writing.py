"""What the writers of all three tasks share: the backbone, the config's text, and reading back what was written."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
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


def output_folder(out: str | Path | None, images: Path) -> Path:
    """The folder for what is written, by default named as that of the images, in letters that shells take."""
    name = re.sub(r'[^\w.-]+', '-', images.name or images.resolve().name)
    return Path(out or Path('own_data') / name)


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


def write_config(path: Path, files: dict[str, Sequence | dict], places: dict[str, dict], template: str, **values):
    """Write a config and the files beside it, each atomically; nothing where a value cannot be kept.

    Args:
        path: The config.
        files: Lines or JSON of each file, by its name.
        places: The arguments of each split's dataset that say where its data are.
        template: The config as :func:`fill` takes it, with ``$loaders`` for the three loaders.
        **values: The values. ``classes`` is written to a file where mmengine would change a name, in the config or in
            the dump of it in a work dir.

    Raises:
        OSError: A file cannot be written.
        ValueError: A value cannot stand in a config.
    """
    if any(SUBSTITUTED in name for name in values['classes']):
        files['class_names.txt'] = values['classes']
        values['classes'] = path.parent / 'class_names.txt'
    values |= {'test': places['val']} | places
    python(path)  # the Runner writes its name into the config
    texts = {path.name: fill(template.replace('$loaders\n', LOADERS), values)}
    for name, content in files.items():
        texts[name] = json.dumps(content) if isinstance(content, dict) else ''.join(f'{line}\n' for line in content)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_file(path.parent / name, lambda file, text=text: file.write(text.encode()))


def compare(data: Folder, config: Path, found: dict[str, dict], read: Callable, unused: str = 'images') -> None:
    """Read a config as the tools do, and note where its datasets differ from what was found.

    Args:
        data: The folder, which takes the notes.
        config: The config.
        found: What belongs to each image of each split.
        read: Gives the same of a sample of a dataset and the names of its classes.
        unused: What to call images that a dataset leaves out.
    """
    config = Config.fromfile(config)
    for split, images in found.items():
        settings = dict(config[f'{split}_dataloader'].dataset, pipeline=[], serialize_data=False)
        with contextlib.redirect_stdout(io.StringIO()):  # COCO's API prints
            dataset = DATASETS.build(settings)
        samples = (dataset.get_data_info(i) for i in range(len(dataset)))
        given = {Path(sample['img_path']): read(sample, dataset.metainfo['classes']) for sample in samples}
        lacking = [image for image in images if image not in given]
        differing = [image for image in images if image in given and images[image] != given[image]]
        data.note_items(f'{split}: {len(lacking)} {unused} are not trained on', lacking)
        data.note_items(f'{split}: {len(differing)} images are not trained on as they were found', differing)
