"""What was never timed on a card is timed there; a clock that says what it is told stands in for one."""

import json

import pytest
import torch
from helpers import randomise, small_backbone

import mmstrip
from mmstrip.ops import compiled
from mmstrip.ops.gpu import choices
from mmstrip.ops.gpu.choices import choices_file, choose

BLOCK = torch.nn.Identity()
WAYS = dict(reference=lambda block, x: x, kernel=lambda block, x: x)
X = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(choices, 'known', {})


class Clock:
    """Gives the seconds of a way, or raises what stands in their place, and the way's results."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, way, block, x):
        name = next(name for name, other in WAYS.items() if other is way)
        self.asked.append(name)
        if isinstance(self.seconds[name], Exception):
            raise self.seconds[name]
        return self.seconds[name], [way(block, x)]


@pytest.mark.parametrize('reference, kernel, right', [(1, 2, 'reference'), (2, 1, 'kernel'), (1, 1, 'reference')])
def test_the_fastest_is_chosen_once(reference, kernel, right, monkeypatch):
    clock = Clock(reference=reference, kernel=kernel)
    assert [choose('block', BLOCK, X, WAYS, clock) for _ in range(3)] == [right] * 3
    monkeypatch.setattr(choices, 'known', {})  # as in another process
    assert choose('block', BLOCK, X, WAYS, clock) == right
    assert clock.asked == ['reference', 'kernel']


@pytest.mark.parametrize('operation, x', [('others', X), ('block', X[:1]), ('block', X.half())])
def test_another_operation_shape_or_type_is_timed_too(operation, x):
    clock = Clock(reference=2, kernel=1)
    choose('block', BLOCK, X, WAYS, clock)
    choose(operation, BLOCK, x, WAYS, clock)
    with torch.no_grad():
        choose(operation, BLOCK, x, WAYS, clock)
    assert len(clock.asked) == 6


@pytest.mark.parametrize('kernel', [lambda block, x: 1.1 * x, lambda block, x: x * torch.tensor(float('nan'))])
def test_what_is_wrong_is_not_chosen(kernel, monkeypatch):
    monkeypatch.setitem(WAYS, 'kernel', kernel)
    assert choose('block', BLOCK, X, WAYS, Clock(reference=2, kernel=1)) == 'reference'


@pytest.mark.parametrize('reference, right', [(1, 'reference'), (RuntimeError('out of memory'), 'reference')])
def test_what_fails_is_not_chosen(reference, right):
    clock = Clock(reference=reference, kernel=RuntimeError('no compiler'))
    assert choose('block', BLOCK, X, WAYS, clock) == right


def test_reference_without_a_card_and_when_deterministic():
    clock = Clock(reference=2, kernel=1)
    assert choose('block', BLOCK, X, WAYS) == 'reference'
    torch.use_deterministic_algorithms(True)
    try:
        assert choose('block', BLOCK, X, WAYS, clock) == 'reference'
    finally:
        torch.use_deterministic_algorithms(False)
    assert not clock.asked and not choices_file().exists()


@pytest.mark.parametrize('text', ['', '[1]', '{"cut', json.dumps(dict(a='b'))])
def test_a_bad_file_is_timed_again(text):
    choices_file().parent.mkdir()
    choices_file().write_text(text)
    clock = Clock(reference=2, kernel=1)
    assert choose('block', BLOCK, X, WAYS, clock) == 'kernel'
    assert len(clock.asked) == 2 and 'kernel' in choices_file().read_text()


def test_an_unknown_choice_is_timed_again():
    clock = Clock(reference=2, kernel=1)
    choices._write({choices._key('block', X): 'of an older version'})
    assert choose('block', BLOCK, X, WAYS, clock) == 'kernel'
    assert len(clock.asked) == 2


@pytest.mark.parametrize('way', ['modules', 'formulas'])
def test_each_stage_of_a_network_computes_in_the_way_that_is_chosen(way, monkeypatch):
    monkeypatch.setattr(compiled, '_compile', lambda function, dynamic: function)
    shapes = []

    def run(function, block, x):
        shapes.append(tuple(x.shape))
        return function is not compiled.WAYS[way], [function(block, x)]

    monkeypatch.setattr(compiled, 'choose', lambda *arguments: choose(*arguments, run))
    model = randomise(small_backbone(arch=dict(embed_dims=8, depths=(1, 1, 1, 1)), img_size=32, drop_path_rate=0.5))
    mmstrip.accelerate(model.train(), compile=True)
    before, network = {name: value.clone() for name, value in model.state_dict().items()}, compiled._networks[model]
    x, state = torch.rand(2, 3, 32, 32), torch.get_rng_state()
    network.choose_ways(model, x, None)
    assert [graphs.fixed for graphs in network.blocks] == [compiled.WAYS[way]] * 4
    assert shapes == [shape for i in range(4) for shape in [(2, 8 * 2**i, 8 >> i, 8 >> i)] * 2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.stages[0][0].drop_path.drop_prob == 0.5 and torch.equal(torch.get_rng_state(), state)
