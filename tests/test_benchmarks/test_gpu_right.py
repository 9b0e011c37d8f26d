"""What a GPU must compute, as the report asks it; the same functions on the CPU."""

import pytest
import torch
from helpers.runs import CONFIG

from benchmarks.gpu import right
from benchmarks.gpu.runner import STEPS, errors_of
from mmstrip.engine.host_copy import HostCopy
from mmstrip.engine.launch import build_runner
from mmstrip.utils.config import load_config

RIGHT = [name for name in STEPS if name.startswith('right')]


@pytest.mark.gpu
@pytest.mark.parametrize('step', RIGHT)
def test_right_on_a_gpu(step):
    assert not errors_of(dict(rows=STEPS[step]()))


@pytest.mark.parametrize('step', ['right', 'right-accelerated', 'right-accelerated-deploy', 'right-forms'])
def test_right_on_the_cpu(step):
    """With the smallest network."""
    rows = STEPS[step](dry=True)
    assert rows and not errors_of(dict(rows=rows)), rows
    assert all(0 < row['maps'] < 0.06 for row in rows)


def test_wrong_values_are_seen():
    _, maps = right.images_and_outcome(None, (1, 1), False)
    with pytest.raises(ValueError, match=r'maps differ by .* from float64, where 1e-04 is allowed'):
        right.errors(None, 'cpu', train=False, cascade=False)
    broken = {name: value.clone() for name, value in maps.items()}
    broken['map 2'][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match='maps differ by nan'):
        right.check(broken, maps, 'float32')
    _, expected = right.images_and_outcome(None, (1, 1), True)
    largest = max((name for name in expected if name.startswith('grad')), key=lambda name: expected[name].norm())
    with pytest.raises(ValueError, match='gradients differ by'):
        right.check(expected | {largest: 1.01 * expected[largest]}, expected, 'float32')
    ways = dict(parallel=dict(train=False, cascade=False), right=dict(train=False))
    wrong, row = right.compare(ways, dry=True)
    assert wrong['way'] == 'parallel' and wrong['error'].startswith('ValueError: maps differ')
    assert row['way'] == 'right' and row['maps'] < 1e-4


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
