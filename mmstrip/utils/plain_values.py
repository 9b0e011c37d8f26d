"""Nested values as plain ones, which load without running code, and back."""

from collections import OrderedDict
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

_PLAIN = (str, bytes, int, float, bool, type(None), torch.Size, torch.dtype)
_HISTORY = {'history', 'counts', 'max_length'}
_MARKS = {'mmstrip.array': lambda value: value.cpu().numpy(), 'mmstrip.set': set, 'mmstrip.frozenset': frozenset}
_DEPTH = 50


def to_plain(content: dict) -> tuple[dict, dict[str, str]]:
    """Copy to plain values: tensors, numbers, strings, dicts, lists and tuples; :func:`from_plain` reverses this.

    NumPy arrays become tensors and sets become lists, each in a dict whose only key names the type; histories become
    dicts of tensors.

    Returns:
        The copy; and remarks by dotted key, to follow the key, on values that are left out because they have no plain
        form or that come back as another type.
    """
    remarks: dict[str, str] = {}
    return _plain(content, (), remarks), remarks


class _LeftOut:
    """Stands for a value without a plain form."""


def _plain(value, place: tuple, remarks: dict[str, str]):
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _PLAIN:
        return value
    if type(value) in (Tensor, nn.Parameter):
        return value.detach()
    if isinstance(value, HistoryBuffer):
        history, counts = (torch.from_numpy(np.array(part, dtype=float)) for part in value.data)
        return dict(history=history, counts=counts, max_length=value.max_length)
    if type(value) is np.ndarray:
        with suppress(TypeError, ValueError):  # strings, objects, dates, another byte order
            return {'mmstrip.array': torch.from_numpy(value.copy())}
    elif len(place) < _DEPTH:
        if isinstance(value, dict):
            return _plain_dict(value, place, remarks)
        if isinstance(value, (list, tuple, set, frozenset)):
            return _plain_sequence(value, place, remarks)
    return _left_out(value, place, remarks)


def _left_out(value, place: tuple, remarks: dict[str, str]) -> type:
    remarks[_key(place)] = f'is not saved, because {_name(value)} needs code to load'
    return _LeftOut


def _key(place: tuple) -> str:
    return '.'.join(map(str, place))


def _plain_dict(value: dict, place: tuple, remarks: dict[str, str]) -> dict:
    if isinstance(value, OrderedDict) and all(type(part) in (Tensor, nn.Parameter) for part in value.values()):
        return value  # a state dict, with its _metadata
    if type(value) not in (dict, OrderedDict):
        remarks[_key(place)] = f'is {_name(value)} and will come back as a dict'
    copy = OrderedDict() if isinstance(value, OrderedDict) else {}
    if hasattr(value, '_metadata'):
        copy._metadata = value._metadata
    for key, part in value.items():
        key = key.item() if isinstance(key, np.generic) else key
        inside = (*place, key)
        plain = _plain(part, inside, remarks) if _is_plain_key(key) else _left_out(key, inside, remarks)
        if plain is not _LeftOut:
            copy[key] = plain
    return copy


def _plain_sequence(value, place: tuple, remarks: dict[str, str]):
    parts = [_plain(part, (*place, index), remarks) for index, part in enumerate(value)]
    if any(part is _LeftOut for part in parts):  # the others would change positions
        return _left_out(value, place, remarks)
    kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    if type(value) is not kind:
        remarks[_key(place)] = f'is {_name(value)} and will come back as a {kind.__name__}'
    if kind in (set, frozenset):
        return {f'mmstrip.{kind.__name__}': parts}
    return tuple(parts) if kind is tuple else parts


def _name(value) -> str:
    kind = type(value)
    return f'a {kind.__qualname__}' + (f' of {value.dtype}' if isinstance(value, np.ndarray) else '')


def _is_plain_key(key) -> bool:
    return type(key) in _PLAIN or (type(key) is tuple and all(map(_is_plain_key, key)))


def from_plain(value: object) -> Any:
    """Reverse :func:`to_plain`; dicts and lists are changed in place.

    Raises:
        Exception: Of any type, if the content does not come from :func:`to_plain`.
    """
    if isinstance(value, dict):
        if set(value) == _HISTORY and isinstance(value['history'], Tensor):
            history, counts = (value[name].cpu().numpy() for name in ('history', 'counts'))
            return HistoryBuffer(history, counts, value['max_length'])
        for key, part in value.items():
            value[key] = from_plain(part)
        if len(value) == 1 and (mark := next(iter(value))) in _MARKS:
            return _MARKS[mark](value[mark])
    elif isinstance(value, list):
        value[:] = map(from_plain, value)
    elif type(value) is tuple:
        value = tuple(map(from_plain, value))
    return value
