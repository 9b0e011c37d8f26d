"""Parameter groups: merged where settings are equal, and filled from the checkpoints of unmerged ones."""

import copy
from unittest import mock

import pytest
import torch
from helpers import ROOT
from helpers.configs import build_model
from helpers.runs import train_here
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR, build_optim_wrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmstrip.engine import param_groups, resumable
from mmstrip.engine.param_groups import regroup

CONSTRUCTOR = 'mmstrip.GroupedOptimWrapperConstructor'
WRAPPER = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
    paramwise_cfg=dict(bias_decay_mult=0.0, custom_keys={'0': dict(lr_mult=0.1), '2': dict(decay_mult=1.0)}),
    clip_grad=dict(max_norm=1.0),
)


def effective(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(names[id(p)], group) for group in optimizer.param_groups for p in group['params']]
    return {name: (group['lr'], group['weight_decay']) for name, group in groups}


def test_the_imagenet_recipe_has_two_groups_with_the_settings_of_605():
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py')
    model = build_model(config)
    one_each = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper)).optimizer
    merged = build_optim_wrapper(model, dict(config.optim_wrapper, constructor=CONSTRUCTOR)).optimizer
    assert (len(one_each.param_groups), len(merged.param_groups)) == (605, 2)
    assert effective(merged, model) == effective(one_each, model)
    for group in merged.param_groups:
        assert all(dict(model.named_parameters())[name] is p for name, p in zip(group['param_names'], group['params']))


class Training:
    """A network with an optimizer and two schedulers, step by step on the same data."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        self.wrapper = build_optim_wrapper(self.model, copy.deepcopy(WRAPPER | options))
        warm_up = LinearLR(self.wrapper, 0.1, by_epoch=False, end=2)
        self.schedulers = [warm_up, CosineAnnealingLR(self.wrapper, T_max=6, by_epoch=False, begin=2, end=8)]

    def run(self, steps):
        for step in steps:
            data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            self.wrapper.update_params(self.model(data).square().mean())
            for scheduler in self.schedulers:
                scheduler.step()
        return self

    def state(self):
        schedulers = [scheduler.state_dict() for scheduler in self.schedulers]
        parts = dict(optimizer=self.wrapper.state_dict(), param_schedulers=schedulers)
        return copy.deepcopy(parts | dict(state_dict=self.model.state_dict()))

    def resume(self, state):
        self.model.load_state_dict(state['state_dict'])
        self.wrapper.load_state_dict(state['optimizer'])
        for scheduler, part in zip(self.schedulers, state['param_schedulers']):
            scheduler.load_state_dict(part)
        return self


@pytest.mark.parametrize('paramwise', [WRAPPER['paramwise_cfg'], dict(bias_decay_mult=1.0)])
def test_a_checkpoint_with_a_group_per_parameter_resumes_as_it_would_have(paramwise):
    options = dict(paramwise_cfg=paramwise, clip_grad=None)
    old = Training(**options).run(range(4))
    state, expected = old.state(), old.run(range(4, 8)).model.state_dict()
    resumed = Training(constructor=CONSTRUCTOR, **options)
    regroup(state['optimizer'], state['param_schedulers'], resumed.wrapper, resumed.model)
    assert len(state['optimizer']['param_groups']) == len(resumed.wrapper.optimizer.param_groups) < 6
    resumed.resume(state).run(range(4, 8))
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_merged_groups_train_as_single_ones_and_resume_themselves():
    one_each, merged = Training().run(range(4)), Training(constructor=CONSTRUCTOR).run(range(4))
    state = merged.state()
    regroup(state['optimizer'], state['param_schedulers'], merged.wrapper, merged.model)
    assert str(state) == str(merged.state())
    again = Training(constructor=CONSTRUCTOR).resume(state).run(range(4, 8))
    trainings = again, one_each.run(range(4, 8)), merged.run(range(4, 8))
    for weight, other, same in zip(*(training.model.parameters() for training in trainings)):
        torch.testing.assert_close(weight, other)
        assert torch.equal(weight, same)


def test_checkpoints_of_other_settings_are_left_as_they_are():
    old = Training(paramwise_cfg=dict(custom_keys={'0.bias': dict(lr_mult=0.5)})).run(range(2))
    state, resumed = old.state(), Training(constructor=CONSTRUCTOR)
    before = str(state)
    regroup(state['optimizer'], state['param_schedulers'], resumed.wrapper, resumed.model)
    assert str(state) == before


def test_trainings_of_older_versions_resume(tmp_path):
    options = {'optim_wrapper.paramwise_cfg': dict(bias_decay_mult=0.0), 'randomness.seed': 3}
    with mock.patch.object(resumable, '_merge_groups'):
        old, _ = train_here(tmp_path, options)
    runner, warnings = train_here(tmp_path, {**options, 'train_cfg.max_epochs': 2})
    groups = [len(r.optim_wrapper.optimizer.param_groups) for r in (old, runner)]
    assert groups[0] > 100 and groups[1] == 2 and 'parameter groups' not in warnings
    assert runner.epoch == 2 and runner._load_from == str(tmp_path / 'epoch_1.pth')


class NoReads(TorchDispatchMode):
    """Reading a tensor's value, for which a host would wait, is an error."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **keywords or {})


def test_no_step_waits_for_the_gradient_norm(monkeypatch):
    """On CUDA the log has that of the step before."""
    training, norms = Training(constructor=CONSTRUCTOR), []
    monkeypatch.setattr(param_groups, '_is_on_gpu', lambda norm: norms.append(norm) or True)
    hub = training.wrapper.message_hub
    hub.log_scalars.pop('train/grad_norm', None)
    for step in range(3):
        training.model(torch.ones(1, 4)).square().mean().backward()
        with NoReads():
            training.wrapper._clip_grad()
        logged = hub.log_scalars.get('train/grad_norm')
        assert (logged and logged.current()) == (norms[step - 1].item() if step else None)
    with pytest.raises(AssertionError), NoReads():
        float(norms[0])
