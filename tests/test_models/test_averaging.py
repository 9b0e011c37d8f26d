"""mmstrip.ExponentialMovingAverage: mmengine's values in few calls."""

import copy
from collections import Counter

import pytest
import torch
from mmengine import model as mmengine
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def network() -> nn.Module:
    """With parameters of two types and layouts, and buffers of floats and integers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3).to(torch.bfloat16))
    model.register_buffer('integers', torch.arange(5))
    return model


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


def average_of(model: nn.Module, ema_type: str, **arguments) -> mmengine.BaseAveragedModel:
    """What EMAHook builds."""
    runner = Runner.__new__(Runner)
    runner.model = model
    hook = EMAHook(ema_type, momentum=0.3, **arguments)
    hook.before_run(runner)
    return hook.ema_model


@pytest.mark.parametrize('arguments', [{}, dict(update_buffers=True), dict(interval=2)], ids=str)
def test_values_and_state_dicts_are_mmengine_s(arguments):
    model = network()
    ours, theirs = (average_of(model, f'{scope}ExponentialMovingAverage', **arguments) for scope in ('mmstrip.', ''))
    assert type(theirs) is mmengine.ExponentialMovingAverage is not type(ours)
    model[0].to(memory_format=torch.channels_last)  # as a hook may later
    for step in range(5):
        if step == 3:  # resumed
            ours = average_of(network(), 'mmstrip.ExponentialMovingAverage', **arguments)
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1 + torch.rand_like(value) if value.is_floating_point() else 1)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_an_update_takes_one_call_for_all_tensors_that_are_alike():
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(20)))
    average = average_of(model, 'mmstrip.ExponentialMovingAverage')
    average.update_parameters(model)
    with Calls() as calls:
        average.update_parameters(model)
    assert {name: calls.names[name] for name in ('_foreach_lerp_', '_foreach_copy_', 'lerp_', 'copy_')} == {
        '_foreach_lerp_': 1,
        '_foreach_copy_': 2,  # of floats and of integers
        'lerp_': 0,
        'copy_': 0,
    }
