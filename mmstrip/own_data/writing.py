"""Configs as text: what those of all three tasks share."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from ..models import StripMLP
from ..models.state_dict import recognise_backbone
from ..utils.checkpoints import read_checkpoint
from ..utils.files import write_file

WIDTH = 110


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

    def arguments(self) -> str:
        """Its arguments as Python."""
        arch = self.arch if isinstance(self.arch, str) else dict(_delete_=True, **self.arch)  # the base has a name
        others = [f'{name}={written(value)}' for name, value in self.others.items()]
        return ', '.join([f'arch={written(arch)}', *others, f'init_cfg={"init" if self.init_cfg else None}'])


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


def make_folder(out: str | Path | None, images: Path) -> Path:
    """The folder for what is written, by default named as that of the images, in letters that shells take."""
    name = re.sub(r'[^\w.-]+', '-', images.name or images.resolve().name)
    folder = Path(out or Path('own_data') / name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def base(*parts: str) -> list[str]:
    """The lines of ``_base_``; the toolboxes' own tools know ``mmstrip::`` only once mmstrip was imported."""
    first, *rest = (f"'mmstrip::{part}.py'" for part in parts)
    first = f"__import__('mmstrip') and {first}"
    return ['_base_ = [', *(f'    {part},' for part in (first, *rest)), ']'] if rest else [f'_base_ = [{first}]']


def written(value) -> str:
    """As Python, dicts as configs have them."""
    if isinstance(value, dict):
        return f'dict({", ".join(f"{key}={written(part)}" for key, part in value.items())})'
    return repr(value)


def assign(name: str, value) -> list[str]:
    """``name = value``, a list of names over as many lines as it takes."""
    text = f'{name} = {written(value)}'
    if len(text) <= WIDTH or not isinstance(value, list):
        return [text]
    lines, line = [f'{name} = ['], '   '
    for item in value:
        if len(line) + len(repr(item)) + 2 > WIDTH:
            lines.append(line)
            line = '   '
        line += f' {item!r},'
    return [*lines, line, ']']


def start(backbone: Backbone) -> list[str]:
    return assign('init', backbone.init_cfg) if backbone.init_cfg else []


def schedule(warm_up: int, **decay) -> str:
    """The base's two schedulers with another end of the warm-up, and other values of the decay."""
    values = ', '.join(f'{key}={value}' for key, value in decay.items())
    return (
        f'param_scheduler = [dict(_base_.param_scheduler[0], end={warm_up}), dict(_base_.param_scheduler[1], {values})]'
    )


def check_positive(**arguments: int | None) -> None:
    """Raises ValueError for one that is given and not positive."""
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(f'{name} must be positive, but got {value}')


def write_config(folder: Path, name: str, lines: Sequence[str]) -> Path:
    """Write a config atomically, and read it as the tools do.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / f'{name}.py'
    write_lines(path, lines)
    Config.fromfile(path)
    return path


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file atomically."""
    write_file(path, lambda file: file.write(''.join(f'{line}\n' for line in lines).encode()))
