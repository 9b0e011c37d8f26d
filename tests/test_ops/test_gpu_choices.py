"""What was never timed on a card is timed there; a clock that says what it is told stands in for one."""

import copy
import json

import pytest
import torch
from helpers import randomise, small_backbone

import mmstrip
from mmstrip.ops import compiled
from mmstrip.ops.gpu import choices
from mmstrip.ops.gpu.choices import choices_file, choose

BLOCK = [torch.nn.Identity()]
WAYS = dict(reference=lambda block, *maps: maps, kernel=lambda block, *maps: maps)
X = [torch.ones(2, 3)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(choices, 'known', {})


class Clock:
    """Gives the seconds of a way, or raises what stands in their place, and the way's results."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, way, modules, maps):
        name = next(name for name, other in WAYS.items() if other is way)
        self.asked.append(name)
        if isinstance(self.seconds[name], Exception):
            raise self.seconds[name]
        return self.seconds[name], choices.run_once(way, modules, maps)


@pytest.mark.parametrize('reference, kernel, right', [(1, 2, 'reference'), (2, 1, 'kernel'), (1, 1, 'reference')])
def test_the_fastest_is_chosen_once(reference, kernel, right, monkeypatch):
    clock = Clock(reference=reference, kernel=kernel)
    assert [choose('block', BLOCK, X, WAYS, clock) for _ in range(3)] == [right] * 3
    monkeypatch.setattr(choices, 'known', {})  # as in another process
    assert choose('block', BLOCK, X, WAYS, clock) == right
    assert clock.asked == ['reference', 'kernel']


@pytest.mark.parametrize(
    'operation, maps', [('others', X), ('block', [X[0][:1]]), ('block', [X[0].half()]), ('block', X * 2)]
)
def test_another_operation_shape_or_type_is_timed_too(operation, maps):
    clock = Clock(reference=2, kernel=1)
    choose('block', BLOCK, X, WAYS, clock)
    choose(operation, BLOCK, maps, WAYS, clock)
    with torch.no_grad():
        choose(operation, BLOCK, maps, WAYS, clock)
    assert len(clock.asked) == 6


@pytest.mark.parametrize(
    'kernel', [lambda block, x: 1.1 * x, lambda block, x: x * torch.tensor(float('nan')), lambda block, x: (x, x)]
)
def test_what_is_wrong_is_not_chosen(kernel, monkeypatch):
    monkeypatch.setitem(WAYS, 'kernel', kernel)
    assert choose('block', BLOCK, X, WAYS, Clock(reference=2, kernel=1)) == 'reference'


@pytest.mark.parametrize('reference', [1, RuntimeError('out of memory')])
def test_what_fails_is_not_chosen(reference):
    clock = Clock(reference=reference, kernel=RuntimeError('no compiler'))
    assert choose('block', BLOCK, X, WAYS, clock) == 'reference'


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


def test_results_are_maps_and_gradients():
    """Of maps that require one, and of all parameters; the network's own gradients would be in the way."""
    layer = torch.nn.Linear(3, 3)
    layer.weight.grad = torch.ones(3, 3)
    maps = [torch.rand(2, 3), torch.rand(2, 3, requires_grad=True)]
    y, grad, vector = choices.run_once(lambda layer, x, other: (layer(x), layer(x) * other)[1], [layer], maps)
    expected = layer(maps[0]) * maps[1]
    grads = torch.autograd.grad(expected, [maps[1], layer.weight, layer.bias], expected)
    torch.testing.assert_close([y, grad], [expected, grads[0]])
    torch.testing.assert_close(vector, torch.cat([one.flatten() for one in grads[1:]]))
    with torch.no_grad():
        assert len(choices.run_once(lambda layer, x, other: layer(x), [layer], maps)) == 1


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(compiled, '_compile', lambda function, dynamic: function)
    model = randomise(small_backbone(arch=dict(embed_dims=8, depths=(1, 1, 1, 1)), img_size=32, drop_path_rate=0.5))
    return mmstrip.accelerate(model.train(), compile=True)


@pytest.mark.parametrize('way', ['modules', 'formulas'])
def test_each_stage_of_a_network_computes_in_the_way_that_is_chosen(way, network, monkeypatch):
    """Its blocks, and the step before them, on maps of the shapes to come."""
    shapes = []

    def run(function, modules, maps):
        shapes.append([tuple(x.shape) for x in maps])
        seconds = function not in (compiled.BLOCK_WAYS[way], compiled.STEP_WAYS[way])
        return seconds, choices.run_once(function, modules, maps)

    monkeypatch.setattr(compiled, 'choose', lambda *arguments: choose(*arguments, run))
    before, graphs = copy.deepcopy(network.state_dict()), compiled._networks[network]
    x, state = torch.rand(2, 3, 32, 32), torch.get_rng_state()
    graphs.choose_ways(network, x, None)
    assert [one.fixed for one in graphs.blocks] == [compiled.BLOCK_WAYS[way]] * 4
    assert [one.fixed for one in graphs.steps] == [compiled.STEP_WAYS[way]] * 4
    expected = [[(2, 3, 32, 32)]]
    for i in range(4):
        block = (2, 8 * 2**i, 8 >> i, 8 >> i)
        expected += [[block], [block] * (i + 1)]
    assert shapes == [one for pair in zip(expected, expected) for one in pair][:16]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.stages[0][0].drop_path.drop_prob == 0.5 and torch.equal(torch.get_rng_state(), state)


def test_blocks_without_a_formula_are_not_timed(network, monkeypatch):
    """Both ways would be the modules."""
    operations = []
    monkeypatch.setattr(compiled, 'choose', lambda operation, *rest: operations.append(operation) or 'formulas')
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(network.stages[1])
    graphs = compiled._networks[network]
    graphs.choose_ways(network, torch.rand(2, 3, 32, 32), None)
    ways = [next(way for way in one.all_fixed if one.all_fixed[way] is one.fixed) for one in graphs.blocks]
    assert ways == ['formulas', 'modules', 'formulas', 'formulas'] and len(operations) == 7


def test_the_reference_runs_where_timing_fails(network, monkeypatch):
    def fail(*arguments):
        raise AssertionError('no copies of this')

    monkeypatch.setattr(compiled, '_copy', fail)
    graphs = compiled._networks[network]
    graphs.choose_ways(network, torch.rand(2, 3, 32, 32), None)
    assert all(one.fixed is one.all_fixed['modules'] for one in graphs.steps + graphs.blocks)
