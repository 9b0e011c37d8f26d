"""Parts of a training that keep a state which no checkpoint holds."""

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn
from torch.utils.data import Dataset

_CHANGES = {
    *('add', 'append', 'appendleft', 'clear', 'discard', 'extend', 'insert', 'pop', 'popitem', 'popleft', 'remove'),
    *('reverse', 'setdefault', 'sort', 'update'),
}
_INSIDE = ('pipeline', 'transforms', 'branch_pipelines', 'dataset', 'datasets')


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
    """Whether methods of a class, as far as their source shows it, change what its object holds.

    That is: they call what changes a container of the object, add to an attribute, or assign one that they have read
    before. An attribute that is set once, where it was None, is no state.
    """
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in kind.__mro__:
        for method in _methods(base) if base is not object and not base.__module__.startswith('torch.') else ():
            overriding = methods.setdefault(method.name, [])
            if all(any(getattr(node, 'id', '') == 'super' for node in ast.walk(other)) for other in overriding):
                overriding.append(method)
    return any(_changes_state(method) for several in methods.values() for method in several)


def _methods(kind: type) -> list[ast.FunctionDef]:
    """The source of a class's methods, but for its constructor; not that of the functions, which may be decorated."""
    try:
        (source,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # there is none
        return []
    return [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name != '__init__']


def _changes_state(function: ast.FunctionDef) -> bool:
    nodes, read, once = list(ast.walk(function)), {}, set()
    for node in nodes:
        if _attribute(node) and isinstance(node.ctx, ast.Load):
            read[node.attr] = min(node.lineno, read.get(node.attr, node.lineno))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.Is):
            once |= set(map(id, ast.walk(node)))
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
            changed = [_start(node.func.value)]
        elif isinstance(node, ast.AugAssign):
            changed = [_start(node.target)]
        elif isinstance(node, ast.Assign) and id(node) not in once:
            targets = [part for target in node.targets for part in getattr(target, 'elts', [target])]
            changed = [_start(target) for target in targets if isinstance(target, ast.Subscript)]
            changed += [part for part in targets if _attribute(part) and read.get(part.attr, node.lineno) < node.lineno]
        else:
            changed = []
        if any(map(_attribute, changed)):
            return True
    return False


def _attribute(node) -> bool:
    """Whether it is ``self.name``."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'self'


def _start(node):
    """``self.name`` of ``self.name[0][1]``."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node
