"""Sources of the compiled operators, and what they are compiled for: read by setup.py and :mod:`mmstrip.models.native`.

They are compiled on the machine that runs them, with the vector instructions that PyTorch finds there. The extension's
name says which, for which PyTorch and from which sources: where one of them is another, it is not found.
"""

import zlib
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob('*.cpp'))
HEADERS = sorted(HERE.glob('*.h'))

# An instruction set of PyTorch's (torch.backends.cpu.get_cpu_capability) and what it stands for.
VECTOR_FLAGS = {
    'AVX512': ['-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl', '-mfma'],
    'AVX2': ['-mavx2', '-mfma'],
}


def extension_name() -> str:
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(' ', '')
    major, minor = torch.__version__.split('.')[:2]
    digest = zlib.crc32(b''.join(path.read_bytes() for path in SOURCES + HEADERS))
    return f'mmstrip._C_{capability}_torch{major}_{minor}_{digest:08x}'


def compile_flags() -> list:
    # OpenMP's library is PyTorch's own, already loaded: a second one would start threads of its own.
    flags = ['-O3', '-g0', '-fopenmp', '-fno-math-errno', '-fno-trapping-math']
    return flags + VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])


# Fail while loading, not while running, if a symbol is missing.
LINK_FLAGS = ['-Wl,-z,now']
