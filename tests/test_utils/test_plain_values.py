"""Values that hooks put into checkpoints."""

import enum
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from mmstrip.utils.checkpoints import read_checkpoint
from mmstrip.utils.plain_values import to_plain

Pair = namedtuple('Pair', 'one two')
Color = enum.IntEnum('Color', 'RED')


def saved(content: dict, path: Path) -> tuple[dict, dict]:
    """What comes back from a file that PyTorch loads by itself, and the remarks."""
    plain, remarks = to_plain(content)
    torch.save(plain, path)
    torch.load(path, weights_only=True)
    return read_checkpoint(path), remarks


def test_plain_containers_and_arrays_come_back_as_they_were(tmp_path):
    content = dict(
        set={1, 2},
        nested=[(frozenset('ab'), {'deep': {(1, 2)}})],
        tuple=(1, (2.5, 'x'), None, b'y'),
        ordered=OrderedDict(b=1, a=2),
        by_tuple={(1, 'a'): True},
        size=torch.Size([2, 3]),
        dtype=torch.float16,
        number=np.float32(0.1),
    )
    loaded, remarks = saved(content, tmp_path / 'file.pth')
    assert loaded == content and not remarks
    assert type(loaded['ordered']) is OrderedDict and type(loaded['nested'][0]) is tuple
    for array in (
        np.arange(6).reshape(2, 3)[:, ::-1],
        np.array(2.5),
        np.zeros(0, bool),
        np.ones(2, np.float16),
        np.ones(1, 'c8'),
    ):
        loaded, remarks = saved(dict(deep=[{'a.b': array}]), tmp_path / 'file.pth')
        found = loaded['deep'][0]['a.b']
        assert type(found) is np.ndarray and found.dtype == array.dtype and np.array_equal(found, array) and not remarks


@pytest.mark.parametrize(
    'value, words',
    [
        (print, 'is not saved, because a builtin_function_or_method needs code to load'),
        (Path('a'), 'a PosixPath'),
        (Color.RED, 'a Color'),
        (deque([1]), 'a deque'),
        (range(3), 'a range'),
        (slice(1), 'a slice'),
        (np.array(['a']), 'a ndarray of <U1'),
        (np.array([None]), 'a ndarray of object'),
        (np.ones(2, '>f4'), 'a ndarray of >f4'),
        (np.ma.masked_array([1], [True]), 'a MaskedArray of int64'),
        (np.datetime64('2026-11-30'), 'a date'),
        (torch.ones(2).as_subclass(type('Mine', (torch.Tensor,), {})), 'a Mine'),
    ],
)
def test_values_that_need_code_are_left_out_and_named(value, words, tmp_path):
    """In a dict the value alone; in a sequence all of it, as the rest would come back at other places."""
    loaded, remarks = saved(dict(mine=dict(a=1, deep=value), list=[1, value, 2]), tmp_path / 'file.pth')
    assert loaded == dict(mine=dict(a=1))
    assert words in remarks['mine.deep'] and words in remarks['list.1'] and 'a list' in remarks['list']


def test_other_types_of_containers_are_named(tmp_path):
    content = dict(counts=defaultdict(list, a=[1]), pair=Pair(1, 2), keys={Color.RED: 1, 'b': 2})
    loaded, remarks = saved(content, tmp_path / 'file.pth')
    assert loaded == dict(counts=dict(a=[1]), pair=(1, 2), keys=dict(b=2))
    assert remarks['counts'] == 'is a defaultdict and will come back as a dict'
    assert remarks['pair'] == 'is a Pair and will come back as a tuple'
    assert 'a Color' in remarks[f'keys.{Color.RED}']


def test_values_without_end_are_left_out(tmp_path):
    endless: dict = {}
    endless['self'] = endless
    _, remarks = saved(dict(endless=endless, a=1), tmp_path / 'file.pth')
    assert len(remarks) == 1


def test_state_dicts_keep_their_metadata(tmp_path):
    state = torch.nn.BatchNorm2d(2).state_dict()
    state['extra'] = {1}  # of a module with an extra state
    loaded, remarks = saved(dict(state_dict=state), tmp_path / 'file.pth')
    assert loaded['state_dict']._metadata == state._metadata and loaded['state_dict']['extra'] == {1} and not remarks
