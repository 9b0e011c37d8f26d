"""Which trainings and tests run accelerated, and what is left alone."""

import logging
from types import SimpleNamespace

import pytest
from helpers import small_backbone
from helpers.configs import CONFIGS, DENSE
from helpers.runs import train_here
from mmengine.config import Config
from mmengine.hooks import EMAHook
from torch import nn

from mmstrip.engine.hooks import AccelerateHook
from mmstrip.engine.launch import set_accelerate
from mmstrip.models import StripMLP
from mmstrip.ops import compiled
from mmstrip.ops.fast import Fast
from mmstrip.ops.gpu import choices

HOOK = dict(type='mmstrip.AccelerateHook')
BACKBONE = dict(type='mmstrip.StripMLP', arch='tiny')


@pytest.mark.parametrize(
    'model',
    [
        dict(type='ImageClassifier', backbone=BACKBONE),
        dict(type='TTAModel', module=dict(type='Segmentor', backbone=BACKBONE)),
        dict(type='Distiller', teachers=[dict(type='Detector', backbone=dict(type=StripMLP))]),
    ],
)
def test_any_config_with_a_strip_mlp_gets_the_hook(model):
    config = Config(dict(model=model, custom_hooks=[dict(type='MyHook')]))
    for _ in range(2):
        set_accelerate(config, True)
        assert config.default_hooks == dict(accelerate=HOOK) and config.custom_hooks == [dict(type='MyHook')]


def test_configs_without_one_do_not():
    config = Config(dict(model=dict(backbone=dict(type='ResNet')), default_hooks=dict(accelerate=HOOK)))
    set_accelerate(config, True)
    assert not config.default_hooks


def test_it_is_left_out_wherever_it_stands():
    config = Config(dict(model=BACKBONE, default_hooks=dict(mine=HOOK), custom_hooks=[HOOK, dict(type='MyHook')]))
    set_accelerate(config, False)
    assert config.default_hooks == {} and config.custom_hooks == [dict(type='MyHook')]


def test_options_of_the_command_line_stay():
    """Also where the config itself has no hook, so that they come without a type."""
    for hook in (HOOK, {}):
        config = Config(dict(model=BACKBONE, default_hooks=dict(accelerate=dict(hook, compile=True))))
        set_accelerate(config, True)
        assert config.default_hooks == dict(accelerate=dict(HOOK, compile=True))


@pytest.mark.parametrize('path', [CONFIGS[0], DENSE[0], DENSE[-1]], ids=lambda path: path.parent.name)
def test_our_configs_have_it_for_tools_of_others(path, tmp_path):
    """Those that inherit them too, with hooks of their own."""
    mine = tmp_path / 'mine.py'
    mine.write_text(f'_base_ = [{str(path)!r}]\ncustom_hooks = []\ndefault_hooks = dict(logger=dict(interval=1))\n')
    assert Config.fromfile(mine).default_hooks.accelerate == HOOK


def runner_of(model, caplog, **config):
    caplog.set_level(logging.INFO)
    return SimpleNamespace(model=model, cfg=Config(config), logger=logging.getLogger('mmengine'))


def is_fast(model) -> bool:
    return any(isinstance(module, Fast) for module in model.modules())


def test_the_hook_says_once_what_runs(caplog):
    hook, runner = AccelerateHook(), runner_of(nn.Sequential(small_backbone()), caplog)
    logging.getLogger('mmengine').propagate = True
    hook.before_train(runner)
    hook.before_val(runner)
    assert is_fast(runner.model)
    assert [record.message.partition(' blocks')[0] for record in caplog.records] == ['Strip-MLP: 5 of 5']


def test_averaged_models_stay_plain(caplog):
    """EMAHook takes its copy before; afterwards it swaps tensors."""
    runner = runner_of(nn.ModuleDict(dict(backbone=small_backbone())), caplog)
    averaging = EMAHook()
    averaging.before_run(runner)
    AccelerateHook().before_train(runner)
    assert is_fast(runner.model) and not is_fast(averaging.ema_model)


def test_what_is_compiled_is_left_alone(caplog):
    runner = runner_of(small_backbone(), caplog, compile=True)
    AccelerateHook().before_train(runner)
    assert not is_fast(runner.model)


def test_other_models_are_passed_over(caplog):
    runner = runner_of(nn.Linear(2, 2), caplog)
    AccelerateHook().before_test(runner)
    assert not caplog.records


def test_a_training_is_compiled_if_asked(tmp_path, monkeypatch):
    """Of two batches and a validation; on GPUs nobody has to ask."""
    graphs = []
    monkeypatch.setattr(compiled, 'BACKEND', lambda graph, inputs: graphs.append(graph) or graph)
    options = {
        'default_hooks.accelerate.compile': True,
        'model.backbone.out_indices': 0,
        'model.head.in_channels': 16,
        'train_dataloader.dataset.indices': 16,
    }
    runner, _ = train_here(tmp_path, options, validate=True)
    assert type(runner.model.backbone) is compiled.CompiledStripMLP
    assert len(graphs) == 4  # a block and the step before it, with gradients and without
    assert 'Strip-MLP: forward and backward compiled in' in next(tmp_path.glob('*/*.log')).read_text()
    assert all(name.startswith(('backbone.', 'head.')) for name in runner.model.state_dict())


@pytest.mark.parametrize('resumes', [True, False])
def test_what_was_chosen_on_a_card_comes_with_a_checkpoint_that_is_resumed(resumes, monkeypatch):
    monkeypatch.setattr(choices, 'known', {'a block': 'formulas'})
    checkpoint = dict(meta={})
    AccelerateHook().before_save_checkpoint(None, checkpoint)
    choices.known.clear()
    AccelerateHook().after_load_checkpoint(SimpleNamespace(_resume=resumes), checkpoint)
    assert choices.known == ({'a block': 'formulas'} if resumes else {})
