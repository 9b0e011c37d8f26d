"""Parts of a training that keep a state which no checkpoint holds."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator

from torch import nn
from torch.utils.data import Dataset

_KNOWN = ('BatchSyncRandomResize',)
_INSIDE = ('pipeline', 'transforms', 'branch_pipelines', 'dataset', 'datasets')
# self.seen += 1, self.sums['all'] = ..., self.cache.append(...)
_CHANGE = re.compile(
    r'\bself\.\w+(\[[^][]+\])*( [-+*/|&]=|(?<=\]) = |'
    r'\.(add|append|appendleft|clear|extend|insert|pop|popleft|remove|update)\()'
)


def stateful_parts(dataset: Dataset, preprocessor: nn.Module) -> list[str]:
    """Names of the classes whose objects change from image to image or from batch to batch.

    Args:
        dataset: The training's; the transforms of its pipeline and of those inside of it are looked at.
        preprocessor: The model's, with its batch augmentations.
    """
    kinds = dict.fromkeys(map(type, [*_transforms(dataset), *preprocessor.modules()]))
    return [kind.__name__ for kind in kinds if keeps_state(kind)]


def _transforms(part) -> Iterator:
    if isinstance(part, (list, tuple)):
        for inner in part:
            yield from _transforms(inner)
    elif isinstance(part, dict):
        yield from _transforms(list(part.values()))
    elif hasattr(part, '__dict__') and not inspect.isfunction(part):
        if not isinstance(part, Dataset):
            yield part
        yield from _transforms([vars(part).get(name) for name in _INSIDE])


def keeps_state(kind: type) -> bool:
    """Whether the source of a class's methods, but for its constructor, adds to its attributes or fills containers.

    An attribute that is only assigned anew is no sign, as many transforms note their parameters so.
    """
    return kind.__name__ in _KNOWN or any(_CHANGE.search(_methods(base)) for base in kind.__mro__)


def _methods(kind: type) -> str:
    """The source of a class's methods; not that of the functions, which may be decorated."""
    if kind.__module__.startswith('torch.'):
        return ''
    try:
        (source,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # there is none
        return ''
    return '\n'.join(ast.unparse(node) for node in source.body if getattr(node, 'name', '__init__') != '__init__')
