"""The machine that a result is from."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmstrip import __version__, ops

_PACKAGES = {
    'triton': ('triton',),
    'numpy': ('numpy',),
    **{
        name: (f'onedl-{distribution}', distribution)
        for name, distribution in dict(
            mmengine='mmengine', mmcv='mmcv', mmpretrain='mmpretrain', mmdet='mmdetection', mmseg='mmsegmentation'
        ).items()
    },
}
_FORMER = {'mmdet': 'mmdet', 'mmcv': 'mmcv-lite'}  # other names of OpenMMLab's own distributions


def describe(device: str) -> dict:
    """Card, driver, versions and processor, as text or numbers."""
    found = dict(
        device=torch.cuda.get_device_name() if device.startswith('cuda') else f'no GPU: {cpu_name()}',
        python=platform.python_version(),
        torch=torch.__version__,
        mmstrip=__version__,
        commit=_output('git', '-C', str(Path(__file__).parent), 'rev-parse', '--short', 'HEAD'),
        cpu=cpu_name(),
        cores=os.cpu_count(),
        operators=ops.status(),
        command=' '.join(sys.orig_argv[:3]),
        **{name: _version(name) for name in _PACKAGES},
    )
    if device.startswith('cuda'):
        card = torch.cuda.get_device_properties(0)
        found |= dict(
            cards=torch.cuda.device_count(),
            memory_gib=round(card.total_memory / 2**30, 1),
            multiprocessors=card.multi_processor_count,
            capability=f'{card.major}.{card.minor}',
            driver=_output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').split('\n')[0],
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    return found


def cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    names = [line.partition(':')[2].strip() for line in info.read_text().splitlines() if line.startswith('model name')]
    return names[0] if names else platform.processor()


def _version(name: str) -> str:
    for distribution in (*_PACKAGES[name], _FORMER.get(name, name)):
        try:
            return f'{distribution} {version(distribution)}'
        except PackageNotFoundError:
            continue
    return 'not installed'


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 'unknown'
    return done.stdout.strip() or 'unknown'
