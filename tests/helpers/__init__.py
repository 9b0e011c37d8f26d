"""What several tests share."""

import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import mmengine.config.utils
import torch
from yapf.yapflib import yapf_api

from mmstrip import ops
from mmstrip.models import StripMLP

accelerator = import_module('mmstrip.ops.accelerate')  # the function of that name hides the module
HAS_OPERATORS = ops.takes(torch.float32)

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / 'tests' / 'data'
SMALL_ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1))
SMALL_CONFIG = DATA / 'digits_small.py'

# Configs in logs, checkpoints and work dirs stay as they are: formatting takes a second for each.
format_code = yapf_api.FormatCode
yapf_api.FormatCode = lambda text, **_: (text, False)
# A config of a toolbox is found by reading all model indices of it, a second for each; they do not change here.
mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)


def small_backbone(**arguments) -> StripMLP:
    """A backbone that runs in milliseconds."""
    return StripMLP(**{'arch': SMALL_ARCH, 'img_size': 64, **arguments})


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and BN statistic a value that matters, as 0 and 1 hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith('running_var'):
                value.copy_(1 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.train(model.training)


def operators_of(call: Callable) -> set[str]:
    """Names of the compiled operators that a call runs on, of their forward passes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.key for event in profile.key_averages()]
    return {name.removeprefix('mmstrip::') for name in names if name.startswith('mmstrip::')}


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def run(*command, cwd: Path = ROOT, env: dict = {}, timeout: int = 600) -> subprocess.CompletedProcess:
    """Run a command as a user would; `python` is the one that runs the tests."""
    python = str(Path(sys.executable).parent)
    environment = {'OMP_NUM_THREADS': '2', **os.environ, 'PATH': f'{python}{os.pathsep}{os.environ["PATH"]}', **env}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def python(code: str, **options) -> subprocess.CompletedProcess:
    """Run code in a fresh process."""
    return run(sys.executable, '-c', code, **options)


def last_line(output: str) -> str:
    return output.strip().split('\n')[-1]


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code on a page."""
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.S)


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows below the heading of a page's table whose first cell that is, each a list of cells."""
    lines = page.read_text().split('\n')
    start = next(i for i, line in enumerate(lines) if line.startswith(f'| {heading} |'))
    rows = itertools.takewhile(lambda line: line.startswith('|'), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]
