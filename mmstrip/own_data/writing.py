"""What the writers of all three tasks share: the backbone, the config's text, and reading back what was written."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from pprint import pformat
from string import Template
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import DATASETS

from ..models import StripMLP
from ..models.state_dict import recognise_backbone
from ..utils.checkpoints import read_checkpoint
from ..utils.files import write_file
from .folders import Folder, is_line

WIDTH = 110
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
        """Its arguments in a config; ``more`` give way to what the checkpoint decides."""
        arch = self.arch if isinstance(self.arch, str) else dict(_delete_=True, **self.arch)  # the base has a name
        return dict(arch=arch, **(more | self.others), init_cfg=self.init_cfg)


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
    checkpoint = read_checkpoint(init)
    try:
        prefix, settings, others = recognise_backbone(checkpoint.get('state_dict', checkpoint))
    except ValueError as error:
        raise ValueError(f'init: {init}: {error}') from error
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
        return f'dict({keywords(value)})'
    if isinstance(value, list):
        [python(item) for item in value]
        return pformat(value, width=WIDTH, compact=True)
    return repr(value)


def keywords(arguments: dict) -> str:
    """Arguments as they stand within brackets."""
    parts = [f'{name}={python(value)}' for name, value in arguments.items()]
    return (', ' if sum(map(len, parts)) < WIDTH - 20 else ',\n        ').join(parts)


class Output:
    """What will be written for a folder: a config from a template, and files beside it.

    Args:
        folder: Where to write.
        name: Name of the config, without suffix.

    Nothing is written before :meth:`write`, so that an error leaves nothing behind.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.config = folder, folder / f'{name}.py'
        self._contents: dict[Path, bytes] = {}

    def add_lines(self, name: str, lines: Sequence[str]) -> Path:
        return self._add(name, ''.join(f'{line}\n' for line in lines))

    def add_json(self, name: str, content: dict) -> Path:
        return self._add(name, json.dumps(content, allow_nan=False))

    def add_classes(self, names: list[str]) -> list[str] | Path:
        """Names of classes as a config has them: a list, or the path of a file that the datasets read.

        The file is for names that mmengine would change, in the config or in the dump of it in the work dir.
        """
        return self.add_lines('class_names.txt', names) if any(SUBSTITUTED in name for name in names) else names

    def add_config(self, template: str, **values) -> None:
        """Put values in the place of their names; of dicts, what stands between the brackets."""
        texts = {name: (keywords if isinstance(value, dict) else python)(value) for name, value in values.items()}
        text = Template(template).substitute(texts)
        self._contents[self.config] = text.encode()
        python(self.config)  # a name that the Runner writes into its config

    def _add(self, name: str, text: str) -> Path:
        self._contents[self.folder / name] = text.encode()
        return self.folder / name

    def write(self, data: Folder, found: dict[str, dict[Path, object]], read: Callable, unused: str = 'images') -> None:
        """Write each file atomically, read the config as the tools do, and compare its datasets with what was found.

        Args:
            data: Takes a note of what differs.
            found: What belongs to each image of each split.
            read: Gives the same of a sample of a dataset and the names of its classes.
            unused: What to call images that a dataset leaves out.

        Raises:
            OSError: A file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, content in self._contents.items():
            write_file(path, lambda file, content=content: file.write(content))
        config = Config.fromfile(self.config)
        for split, images in found.items():
            with contextlib.redirect_stdout(io.StringIO()):  # COCO's API prints
                settings = dict(config[f'{split}_dataloader'].dataset, pipeline=[], serialize_data=False)
                dataset = DATASETS.build(settings)
            samples = (dataset.get_data_info(i) for i in range(len(dataset)))
            given = {Path(sample['img_path']): read(sample, dataset.metainfo['classes']) for sample in samples}
            lacking = [image for image in images if image not in given]
            differing = [image for image in images if image in given and images[image] != given[image]]
            data.note_items(f'{split}: {len(lacking)} {unused} are not trained on', lacking)
            data.note_items(f'{split}: {len(differing)} images are not trained on as they were found', differing)
