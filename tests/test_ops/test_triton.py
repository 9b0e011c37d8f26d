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
    first = dict(x=x, size=1, eps=1e-6)
    others = [dict(first, x=x.half()), dict(first, size=True), dict(first, size=2), dict(first, eps=None), dict(x=x)]
    with analyzing_once():
        remembering = triton_kernel_wrap.identify_accessed_tensors
        for _ in range(2):
            results = [remembering(ours, arguments, {}) for arguments in (first, dict(first, x=2 * x), *others)]
            assert results == [1, 1, 2, 3, 4, 5, 6]
        assert remembering(strips._forward, first, {}) == 7
        assert [remembering(triton_kernel_wrap, first, {}) for _ in range(2)] == [8, 9]  # another's
    assert triton_kernel_wrap.identify_accessed_tensors is analyze
