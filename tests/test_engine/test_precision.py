"""Mixed precision: which parts of a model it holds for, its optim wrapper, and what ``--amp`` means."""

import contextlib
import threading
import time

import pytest
import torch
from helpers import randomise
from helpers.runs import CONFIG
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmstrip.engine import precision
from mmstrip.engine.precision import amp_dtype, mixed_precision, set_test_amp, set_train_amp
from mmstrip.utils.config import load_config


def dtypes_of(model: nn.Module, *names: str) -> dict[str, torch.dtype]:
    """Filled, when the model runs, with the dtype that each of its modules returns."""
    found = {}
    for name in names:

        def note(_, inputs, outputs, name=name):
            found[name] = (outputs[0] if isinstance(outputs, tuple) else outputs).dtype

        model.get_submodule(name).register_forward_hook(note)
    return found


def test_networks_compute_in_bfloat16_and_return_float32():
    config = load_config(CONFIG)
    init_default_scope(config.default_scope)
    model = randomise(MODELS.build(config.model)).eval()
    found = dtypes_of(model, 'backbone.patch_embed', 'backbone', 'head.fc')
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), mixed_precision(model):
        scores = model.head(model.extract_feat(images))
    half = torch.bfloat16
    assert found == {'backbone.patch_embed': half, 'backbone': torch.float32, 'head.fc': half}
    assert scores.dtype is torch.float32
    with torch.no_grad():
        exact = model.head(model.extract_feat(images))
    assert found['backbone.patch_embed'] is found['head.fc'] is torch.float32
    assert 0 < (scores - exact).abs().max() < 0.05 * exact.abs().max()


def test_models_within_a_model():
    """Such as a student and its teacher: their networks, not their losses and boxes."""

    class Detector(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.backbone(x) @ torch.ones(2, 2)  # stands for what follows the networks

    model = nn.Module()
    model.student = Detector()
    with mixed_precision(model):
        assert 'forward' in vars(model.student.backbone) and 'forward' not in vars(model.student)
        model.student(torch.rand(1, 3, 2, 2))


def test_threads_have_their_own_precision():
    """Begun and ended in any order; a thread that asked for none has float32."""
    model = nn.Module()
    model.backbone = nn.Linear(64, 64)
    x = torch.randn(8, 64)
    exact = model.backbone(x)
    asked = {'none': None, 'first': torch.bfloat16, 'second': torch.bfloat16, 'third': torch.bfloat16}
    results = {name: [] for name in asked}
    barrier = threading.Barrier(len(asked), timeout=20)

    def run(name, dtype):
        for turn in range(3):
            with mixed_precision(model, dtype) if dtype else contextlib.nullcontext():
                barrier.wait()
                results[name].append(model.backbone(x))
                barrier.wait()
                if turn % 2 == (name == 'first'):
                    time.sleep(0.01)  # so that they leave in another order

    threads = [threading.Thread(target=run, args=arguments) for arguments in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, dtype in asked.items():
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            expected = model.backbone(x).float()
        assert torch.equal(expected, exact) == (dtype is None)
        assert len(results[name]) == 3 and all(torch.equal(out, expected) for out in results[name])
    assert 'forward' not in vars(model.backbone) and torch.equal(model.backbone(x), exact)


def test_forward_methods_are_back_after_an_error():
    """Those that somebody has put on a module, too."""
    model = nn.Module()
    model.plain, model.own = nn.Linear(2, 2), nn.Linear(2, 2)
    model.own.forward = own = lambda x: x
    with pytest.raises(ZeroDivisionError), mixed_precision(model):
        assert model.own.forward is not own
        raise ZeroDivisionError
    assert model.own.forward is own and 'forward' not in vars(model.plain)


@pytest.mark.parametrize('runs, dtype', [(True, 'bfloat16'), (False, None)])
def test_auto_is_bfloat16_where_operators_take_it(runs, dtype, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(precision.ops, 'takes', lambda dtype: runs and dtype is torch.bfloat16)
    assert amp_dtype('auto') == dtype
    assert capsys.readouterr().out.startswith(f'--amp auto: {dtype or "float32"}')


PLAIN, OF_GPUS = dict(type='OptimWrapper'), dict(type='AmpOptimWrapper', dtype='float16', loss_scale=512.0)
OF_CPUS, LOOP = dict(type='mmstrip.BFloat16OptimWrapper'), 'mmstrip.MixedPrecisionTestLoop'


@pytest.mark.parametrize(
    'gpu, amp, before, after',
    [
        (True, 'float16', PLAIN, dict(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')),
        (True, 'bfloat16', PLAIN, dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False))),
        (False, 'bfloat16', OF_GPUS, OF_CPUS),
        (False, 'bfloat16', OF_CPUS, OF_CPUS),  # as a run has dumped it
        (False, 'auto', OF_CPUS, PLAIN),
        (False, None, PLAIN, PLAIN),
        (False, 'float16', PLAIN, '--amp float16 needs a GPU, but none is available; use --amp bfloat16 on CPUs'),
        (
            False,
            'bfloat16',
            dict(type='Other'),
            "only with optim_wrapper.type 'OptimWrapper', but the config has 'Other'",
        ),
    ],
)
def test_amp_of_trainings(gpu, amp, before, after, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(precision.ops, 'takes', lambda dtype: False)
    config = Config(dict(optim_wrapper=dict(before, accumulative_counts=2)))
    if isinstance(after, str):
        with pytest.raises(ValueError, match=after):
            set_train_amp(config, amp)
    else:
        set_train_amp(config, amp)
        assert config.optim_wrapper == dict(after, accumulative_counts=2)


def test_amp_of_tests():
    config = Config(dict(test_cfg=dict()))
    for _ in range(2):
        set_test_amp(config, 'bfloat16')
        assert config.test_cfg == dict(type=LOOP, dtype='bfloat16')
    with pytest.raises(ValueError, match="test_cfg.type 'TestLoop', but the config has 'MyLoop'"):
        set_test_amp(Config(dict(test_cfg=dict(type='MyLoop'))), 'bfloat16')
