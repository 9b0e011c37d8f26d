"""What was never timed on a card is timed there; a clock that says what it is told stands in for one."""

import json

import pytest
import torch

from mmstrip.ops.gpu import choices
from mmstrip.ops.gpu.choices import choices_file, choose

WAYS = dict(reference=lambda x: x, kernel=lambda x: x)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))


def clock(**seconds):
    """Gives a way's seconds and notes that it was asked; an error is raised."""
    asked = []

    def time(way, inputs):
        name = next(name for name, other in WAYS.items() if other is way)
        asked.append(name)
        if isinstance(seconds[name], Exception):
            raise seconds[name]
        return seconds[name]

    return time, asked


@pytest.mark.parametrize('reference, kernel, right', [(1, 2, 'reference'), (2, 1, 'kernel'), (1, 1, 'reference')])
def test_the_fastest_is_chosen_once(reference, kernel, right):
    time, asked = clock(reference=reference, kernel=kernel)
    inputs = [torch.zeros(2, 3)]
    assert [choose('block', inputs, WAYS, time) for _ in range(3)] == [right] * 3
    assert asked == ['reference', 'kernel']


@pytest.mark.parametrize(
    'other', [('rows', torch.zeros(2)), ('block', torch.zeros(3)), ('block', torch.zeros(2).half())]
)
def test_another_operation_shape_or_type_is_timed_too(other):
    time, asked = clock(reference=2, kernel=1)
    choose('block', [torch.zeros(2)], WAYS, time)
    choose(other[0], [other[1]], WAYS, time)
    assert len(asked) == 4


def test_what_fails_is_not_chosen():
    time, _ = clock(reference=1, kernel=RuntimeError('no compiler'))
    assert choose('block', [torch.zeros(1)], WAYS, time) == 'reference'
    time, _ = clock(reference=RuntimeError('out of memory'), kernel=1)
    with pytest.raises(RuntimeError, match='out of memory'):
        choose('other', [torch.zeros(1)], WAYS, time)


def test_reference_without_a_card_and_when_deterministic():
    time, asked = clock(reference=2, kernel=1)
    assert choose('block', [torch.zeros(1)], WAYS) == 'reference'
    torch.use_deterministic_algorithms(True)
    try:
        assert choose('block', [torch.zeros(1)], WAYS, time) == 'reference'
    finally:
        torch.use_deterministic_algorithms(False)
    assert not asked and not choices_file().exists()


@pytest.mark.parametrize('text', ['', '[1]', '{"cut', json.dumps(dict(a='b'))])
def test_a_bad_file_is_timed_again(text):
    choices_file().parent.mkdir()
    choices_file().write_text(text)
    time, asked = clock(reference=2, kernel=1)
    assert choose('block', [torch.zeros(1)], WAYS, time) == 'kernel'
    assert len(asked) == 2 and 'kernel' in choices_file().read_text()


def test_an_unknown_choice_is_timed_again():
    time, asked = clock(reference=2, kernel=1)
    inputs = [torch.zeros(1)]
    choices._write({choices._key('block', inputs): 'of an older version'})
    assert choose('block', inputs, WAYS, time) == 'kernel'
    assert len(asked) == 2


def test_other_processes_are_told(monkeypatch):
    """Those that are not the first time nothing."""
    time, asked = clock(reference=2, kernel=1)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda group: 1)
    monkeypatch.setattr(
        torch.distributed, 'broadcast_object_list', lambda chosen, src, group: chosen.__setitem__(0, 'kernel')
    )
    assert choose('block', [torch.zeros(1)], WAYS, time) == 'kernel'
    assert not asked and not choices_file().exists()
