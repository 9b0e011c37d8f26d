"""The library of compiled operators: sources, names and flags for setup.py, and loading.

A build has one library per instruction set in :data:`VARIANTS`; the one for the current CPU is loaded. Its name holds
the PyTorch version and a hash of sources and flags, so an outdated library is not found.
"""

import os
import platform
import zlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = sorted((HERE / 'csrc').glob('*.cpp'))
HEADERS = sorted((HERE / 'csrc').glob('*.h'))

# Instruction sets and their compiler flags, best last.
VARIANTS = {'default': []}
if platform.machine().lower() in ('x86_64', 'amd64'):
    VARIANTS = {
        'avx2': ['-mavx2', '-mfma'],
        'avx512': ['-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl', '-mavx512bf16', '-mfma'],
    }
SANITIZERS = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all']


def is_switched_off() -> bool:
    """Whether the environment disables building and loading the operators."""
    return os.environ.get('MMSTRIP_NATIVE') == '0'


def is_sanitized() -> bool:
    """Whether the environment requests a library with sanitizers (``make sanitize``)."""
    return os.environ.get('MMSTRIP_SANITIZE') == '1'


def variant() -> str | None:
    """The best of :data:`VARIANTS` for PyTorch's CPU capability (see ATEN_CPU_CAPABILITY), or None."""
    if 'default' in VARIANTS:
        return 'default'
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in VARIANTS else None


def library_name(variant: str) -> str:
    major, minor = torch.__version__.split('.')[:2]
    flags = ' '.join([*compile_flags(variant), *link_flags()])
    digest = zlib.crc32(b''.join([flags.encode(), *(path.read_bytes() for path in SOURCES + HEADERS)]))
    kind = 'sanitized_' * is_sanitized() + variant
    return f'_C_{kind}_torch{major}_{minor}_{digest:08x}'


def compile_flags(variant: str) -> list[str]:
    optimized = ['-O1', '-g', *SANITIZERS] if is_sanitized() else ['-O3', '-g0']
    # PyTorch has loaded its OpenMP already; a second one would start its own threads.
    return [*optimized, '-fopenmp', '-fno-math-errno', '-fno-trapping-math', *VARIANTS[variant]]


def link_flags() -> list[str]:
    # Missing symbols fail when loading, not when running.
    return ['-Wl,-z,now', *(SANITIZERS if is_sanitized() else [])]


def load() -> str | None:
    """Load the library for this CPU and PyTorch.

    Returns:
        None if ``torch.ops.mmstrip`` is available, otherwise the reason.
    """
    if is_switched_off():
        return 'MMSTRIP_NATIVE=0 switches the compiled operators off'
    best = variant()
    if best is None:
        return f'the compiled operators need AVX2, but PyTorch uses {torch.backends.cpu.get_cpu_capability()} here'
    name = library_name(best)
    paths = [path for path in (HERE / (name + suffix) for suffix in EXTENSION_SUFFIXES) if path.exists()]
    if not paths:
        return f'the compiled operators are not built for {best.upper()} and PyTorch {torch.__version__} ({name})'
    try:
        torch.ops.load_library(paths[0])
    except OSError as error:
        reason = str(error).strip().split('\n')[0]
        return f'the compiled operators could not be loaded ({reason})'
    return None
