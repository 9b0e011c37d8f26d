"""Triton's kernels in its interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmstrip.ops import gpu

CASES = Path(__file__).with_name('interpreted_kernels.py')


@pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))
def test_kernels(tmp_path):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--basetemp', tmp_path / 'tests', CASES]
    environment = dict(os.environ, TRITON_INTERPRET='1')
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert ' passed' in ran.stdout and 'skipped' not in ran.stdout
