"""Triton's kernels in its interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap

from mmstrip.ops import gpu

CASES = Path(__file__).with_name('interpreted_kernels.py')


@pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))
def test_kernels(tmp_path):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--basetemp', tmp_path / 'tests', CASES]
    environment = dict(os.environ, TRITON_INTERPRET='1')
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert ' passed' in ran.stdout and 'skipped' not in ran.stdout


@pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))
def test_pytorch_analyzes_a_kernel_of_ours_once(monkeypatch):
    """As long as all that decides what it accesses is the same."""
    from mmstrip.ops.gpu import layer_norm, strips
    from mmstrip.ops.gpu.kernels import analyzing_once

    asked = []

    def analyze(kernel, arguments, metadata):
        asked.append(kernel)
        return len(asked)

    monkeypatch.setattr(triton_kernel_wrap, 'identify_accessed_tensors', analyze)
    x, ours = torch.ones(3), layer_norm._forward
    first = dict(x_ptr=x, size=1, eps=1e-6, block=32)
    same, others = (
        [dict(first, x_ptr=2 * x, size=2)],
        [dict(first, **one) for one in (dict(x_ptr=x.half()), dict(block=16), dict(eps=None))],
    )
    with analyzing_once():
        remembering = triton_kernel_wrap.identify_accessed_tensors
        for _ in range(2):
            assert [remembering(ours, one, {}) for one in (first, *same, *others)] == [1, 1, 2, 3, 4]
        assert remembering(strips._forward, first, {}) == 5
        assert [remembering(triton_kernel_wrap, first, {}) for _ in range(2)] == [6, 7]  # another's
    assert triton_kernel_wrap.identify_accessed_tensors is analyze
