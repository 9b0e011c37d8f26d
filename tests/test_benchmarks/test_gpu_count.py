"""What an iteration launches, counted without a GPU, and its bounds."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import count
from benchmarks.gpu.count import Launches
from benchmarks.gpu.iterations import SMALL_ARCH
from mmstrip.ops import gpu

needs_triton = pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))


@pytest.fixture(scope='module')
def counted():
    """An iteration of the ImageNet recipe of Strip-MLP-T, eager, with EMA."""
    average = dict(type='EMAHook', ema_type='mmstrip.ExponentialMovingAverage')
    return count.iteration('Strip-MLP-T', 'eager', options={'custom_hooks': [average]})


def test_an_optimizer_step_takes_few_launches(counted):
    """604 parameters in two groups."""
    assert set(counted.operations['optimizer']) == {'_fused_adamw_', '_foreach_add_'}
    assert counted.operations['optimizer'].total() <= count.OPTIMIZER
    assert counted.reads['optimizer'] == 0


def test_clipping_takes_few_launches(counted):
    assert counted.operations['clipping'].total() <= 25


def test_an_average_of_the_weights_takes_few_launches(counted):
    assert counted.operations['hooks'].total() <= 30


def test_a_network_is_counted_with_its_bytes(counted):
    assert 3000 < counted.operations['network'].total() <= 4000
    assert counted.bytes / 1e9 == pytest.approx(63, abs=2)


def test_operations_compute_nothing_and_keep_layouts():
    x = torch.empty(2, 3, 8, 8).to(memory_format=torch.channels_last)
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1, groups=1)
    with Launches('forward') as counted:
        y = convolution(x)
        y.view(-1)[0] if y.is_contiguous() else y.permute(0, 2, 3, 1).reshape(-1)
    assert y.shape == (2, 4, 8, 8) and y.is_contiguous(memory_format=torch.channels_last)
    assert counted.operations['forward'] == {'convolution': 1}
    assert counted.bytes == 4 * (x.numel() + y.numel() + convolution.weight.numel() + 4)


@needs_triton
def test_inductor_fuses_as_for_a_gpu():
    """One kernel of Triton and one call of a library; private names of PyTorch that are gone would end it."""
    run = torch.compile(lambda x, y: (x.relu() + 1) @ y)
    x, y = torch.empty(32, 64), torch.empty(64, 16)
    with count.card(Launches()) as counted:
        for _ in range(2):
            counted.reset('forward')
            with counted:
                run(x, y)
    assert counted.kernels('forward') == (1, 1)
    assert counted.bytes == 4 * (2 * x.numel() + x.numel() + y.numel() + 32 * 16)  # read and written


@needs_triton
def test_an_accelerated_block_is_within_its_bound():
    """The smallest one, as PyTorch would compile it for a GPU."""
    counted = count.compiled_block('Strip-MLP-T', 'accelerated', 2, dry=True)
    parts = [counted.kernels(phase) for phase in ('forward', 'backward')]
    assert all(kernels > 15 and calls > 5 for kernels, calls in parts)  # of Triton, and products
    assert sum(map(sum, parts)) <= count.BLOCK


@needs_triton
def test_kernels_are_compiled_ahead_of_time(monkeypatch):
    """Those of one layer, for an H100."""
    from benchmarks.gpu import ahead
    from mmstrip.ops.gpu.layer_norm import layer_norm

    def norm(block, x):
        return layer_norm(torch.nn.LayerNorm(x.shape[1], dtype=x.dtype), x.transpose(0, 1).contiguous())

    monkeypatch.setattr(ahead.gpu, 'block_forward', norm)
    found = ahead.compile_kernels(SMALL_ARCH, capabilities=(90,))
    assert list(found) == ['layer_norm: forward', 'layer_norm: backward']
    for ((kernel, *_),) in found.values():
        registers, shared, spilled = ahead.usage(kernel)
        assert 16 < registers <= 255 and 0 < shared < 228 * 1024 and spilled == 0


def test_lists_of_tensors_take_as_many_kernels_as_fit_into_their_arguments():
    tensors = [torch.zeros(3) for _ in range(111)]
    with Launches('a') as counted:
        torch._foreach_mul_(tensors, 2.0)  # 110 tensors a kernel
        torch._foreach_add_(tensors, tensors)  # 64
    assert counted.operations['a'] == {'_foreach_mul_': 2, '_foreach_add_': 2}


def test_host_reads_are_counted():
    loss, label = torch.zeros(()), torch.zeros((), dtype=torch.long)
    with Launches('a') as counted:
        float(loss)
        int(label)  # which is there
    assert counted.reads['a'] == 1 and counted.total == 0


def test_the_fit_tells_its_error():
    cost, errors = count.fit({name: round(ms / 0.04) for name, ms in count.MEASURED.items()})
    assert cost == pytest.approx(0.04, rel=1e-3) and all(
        abs(error) < 2e-3 for pair in errors.values() for error in pair
    )
    cost, errors = count.fit({**{name: ms / 0.04 for name, ms in count.MEASURED.items()}, 'ResNet-50': 18.2 / 0.08})
    assert errors['ResNet-50'][1] == pytest.approx(-0.5) and errors['ResNet-50'][0] > -0.5


def test_tables_state_counts_bounds_and_predictions(monkeypatch, tmp_path, capsys):
    counted = Launches('forward')
    counted.operations |= dict(forward=Counter({'kernel a': 17, 'mm': 7}), backward=Counter({'kernel b': 21, 'mm': 12}))
    counted.operations['optimizer'] = Counter(_fused_adamw_=27)
    counted.bytes = 43e9  # 10 ms
    for name in ('eager_step', 'compiled_block', 'iteration'):
        monkeypatch.setattr(count, name, lambda *_: counted)
    monkeypatch.setattr(count, 'fit', lambda counts: (0.5, dict.fromkeys(counts, (-0.004, 0.12))))  # ms per launch
    monkeypatch.setattr(count.speed, 'spec', lambda name: SimpleNamespace(build=lambda: name))
    flops = 532e12 / 6 / count.BATCH / 1e3  # 1 ms
    monkeypatch.setattr(count, 'analyze_complexity', lambda *_: SimpleNamespace(flops=flops))
    monkeypatch.setattr(count.MMLogger, 'get_instance', lambda *_, **__: None)
    monkeypatch.setattr('sys.argv', ['count', '--page', str(tmp_path / 'page.md')])
    (tmp_path / 'page.md').write_text('Before\n<!-- gpu: counted -->\nold\n<!-- end -->\nAfter\n')
    count.main()
    page = (tmp_path / 'page.md').read_text()
    assert page.startswith('Before\n<!-- gpu: counted -->\nCounted with PyTorch ') and page.endswith(
        '<!-- end -->\nAfter\n'
    )
    assert '| ConvNeXt-T | 84 | 43.0 | 27.8 | +0 % | +12 % |' in page
    block = '| Strip-MLP-T | accelerated | 1 | 17 + 7 | 21 + 12 | 57 (at most 60) |'
    assert block in capsys.readouterr().out and block not in page
    assert page.count(' | 84 | 27 | 43.0 | 11 to 42 |') == 9  # three ways of ours, and two of each peer
    assert '| Strip-MLP-T | accelerated, at most | 1,500 | 40 | 35 |  |' in page
