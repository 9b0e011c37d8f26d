"""What a GPU must compute, as part `right` of the report asks it; the same functions on the CPU."""

import pytest
import torch
from helpers.runs import CONFIG

from benchmarks.gpu import checks
from benchmarks.gpu.steps import NotRunError, Setting, steps_of
from mmstrip.engine.host_copy import HostCopy
from mmstrip.engine.launch import build_runner
from mmstrip.utils.config import load_config

STEPS = list(steps_of('right', Setting('', 'cuda')))
# The others are tested on CPUs by test_resume.py, test_parity.py, test_dense_models.py and, compiled for many sizes,
# by test_strip_mlp.py.
ON_CPU = (
    *('float32-bfloat16-float16-tiny-light', 'sizes', 'forms', 'other-dtypes'),
    *('hooks-do-not-wait', 'compile-static'),
)


@pytest.mark.gpu
@pytest.mark.parametrize('step', STEPS)
def test_right_on_a_gpu(step, tmp_path):
    setting = Setting(str(tmp_path))
    try:
        assert steps_of('right', setting)[step](setting)
    except NotRunError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize('step', ON_CPU)
def test_right_on_the_cpu(step, tmp_path):
    """All that is the same there: with the eager backend of the compiler, and with the smallest networks."""
    setting = Setting(str(tmp_path), 'cpu', tiny=True)
    assert steps_of('right', setting)[step](setting)


def test_wrong_values_are_seen():
    case = checks.small_case()
    right = checks.precision(case, 'cpu', train=False)
    assert 0 < right['maps'] < 1e-5
    with pytest.raises(checks.WrongResultError, match=r'maps differ by .* from float64 on the CPU, where 1e-04 is'):
        checks.precision(case, 'cpu', train=False, cascade=False)
    maps = case.expected(False)
    broken = {name: value.clone() for name, value in maps.items()}
    broken['map 2'][0, 0, 0, 0] = torch.nan
    with pytest.raises(checks.WrongResultError, match='maps differ by nan'):
        checks.check(broken, maps, (1, 1))


@pytest.mark.parametrize('read', [float, bool, torch.Tensor.item, lambda x: x.nonzero(), lambda x: torch.equal(x, x)])
def test_reading_a_value_is_seen(read):
    with pytest.raises(checks.WrongResultError, match='lets the host wait for the device'), checks.no_host_reads():
        read(torch.ones(()))
    with checks.no_host_reads():
        torch.ones(3).sum().to('cpu', non_blocking=True)


class Late(HostCopy):
    """A copy as of a GPU that has much to do: it is there when it is waited for."""

    def arrived(self) -> bool:
        return False


def test_a_loss_that_comes_late_is_seen_before_a_checkpoint(tmp_path, monkeypatch):
    """And it is that of its own iteration that is named."""
    monkeypatch.setattr('mmstrip.engine.host_copy.HostCopy', Late)
    config = load_config(str(CONFIG), {'optim_wrapper.optimizer.lr': 1e30, 'param_scheduler': None})
    config.work_dir = str(tmp_path)
    config.train_dataloader.update(num_workers=0, persistent_workers=False)
    runner = build_runner(config)
    with pytest.raises(
        FloatingPointError, match=r'loss is (nan|inf) at iteration [23] \(epoch 1\), learning rate 1e\+30'
    ):
        runner.train()
    assert runner.iter == 3 and not list(tmp_path.glob('*.pth'))  # it was at the end of the epoch


@pytest.mark.gpu
def test_a_loss_on_a_gpu_is_seen_before_a_checkpoint(tmp_path):
    config = load_config(str(CONFIG), {'optim_wrapper.optimizer.lr': 1e30, 'param_scheduler': None})
    config.work_dir = str(tmp_path)
    with pytest.raises(FloatingPointError, match='loss is (nan|inf) at iteration'):
        build_runner(config).train()
    assert not list(tmp_path.glob('*.pth'))
