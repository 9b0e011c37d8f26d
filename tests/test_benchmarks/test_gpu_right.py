"""What a GPU must compute, as the report asks it; the same functions on the CPU."""

import pytest
import torch
from helpers.runs import CONFIG

from benchmarks.gpu import Setting, right
from benchmarks.gpu.runner import STEPS
from mmstrip.engine.host_copy import HostCopy
from mmstrip.engine.launch import build_runner
from mmstrip.utils.config import load_config

RIGHT = [name for name in STEPS if name.startswith(('right', 'resume'))]


@pytest.mark.gpu
@pytest.mark.parametrize('step', RIGHT)
def test_right_on_a_gpu(step, tmp_path):
    assert STEPS[step](Setting(str(tmp_path)))


@pytest.mark.parametrize('step', ['right', 'right-accelerated', 'right-accelerated-deploy', 'right-forms'])
def test_right_on_the_cpu(step):
    """With the smallest network; resumption has tests of its own."""
    assert STEPS[step](Setting('', 'cpu', tiny=True))


def test_wrong_values_are_seen():
    _, maps = right.images_and_outcome(right.SMALLEST, (64, 64), False)
    with pytest.raises(right.WrongResultError, match=r'maps differ by .* from float64, where 1e-04 is allowed'):
        right.errors(right.SMALLEST, 'cpu', train=False, cascade=False)
    broken = {name: value.clone() for name, value in maps.items()}
    broken['map 2'][0, 0, 0, 0] = torch.nan
    with pytest.raises(right.WrongResultError, match='maps differ by nan'):
        right.check(broken, maps, 'float32')
    ways = dict(parallel=dict(train=False, cascade=False), right=dict(train=False))
    with pytest.raises(right.WrongResultError, match=r"parallel: maps differ .*; right: {'right': {'maps': "):
        right._all(ways, right.SMALLEST, 'cpu')


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
