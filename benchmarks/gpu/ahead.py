"""Compile the Triton kernels of Strip-MLP-T for GPUs ahead of time, without a GPU: registers, memory and spills.

    python -m benchmarks.gpu.ahead

A training step of one block of each stage, in bfloat16, compiles its kernels for an A100, an H100 and a B200 instead of
launching them. Prints a table with the most that any variant of a kernel uses.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from mmstrip.models import StripMLP
from mmstrip.ops import gpu
from mmstrip.ops.gpu import kernels

from ..results import markdown_table

CAPABILITIES = (80, 90, 100)
IMAGES = 8


@contextmanager
def target(capability: int) -> Iterator[None]:
    """Let Triton take the CPU for a card."""
    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget('cuda', capability, 32),
        get_current_device=lambda: capability,
        get_active_torch_device=lambda: torch.device('cpu'),
        get_device_interface=lambda: torch.cpu,
        get_current_stream=lambda device=None: 0,
    )
    with mock.patch.object(driver, '_active', card):
        yield


def compile_kernels(arch='tiny', capabilities=CAPABILITIES, dtype=torch.bfloat16) -> dict[str, list[list]]:
    """Name of each kernel -> its compiled variants for each capability."""
    found: dict[str, list[list[CompiledKernel]]] = {}
    run = JITFunction.run

    def compile_it(kernel, *args, grid, warmup, **options) -> None:
        name = f'{kernel.__module__.rpartition(".")[2]}: {kernel.__name__.strip("_")}'
        for number, capability in enumerate(capabilities):
            with target(capability):
                variants = found.setdefault(name, [[] for _ in capabilities])[number]
                variants.append(run(kernel, *args, grid=grid, warmup=True, **options))

    model = StripMLP(arch).to(dtype)
    with mock.patch.object(kernels, 'INTERPRETED', True), mock.patch.object(JITFunction, 'run', compile_it):
        for i, stage in enumerate(model.stages):
            x = torch.zeros(IMAGES, model.embed_dims * 2**i, *[56 // 2**i] * 2, dtype=dtype, requires_grad=True)
            y = gpu.block_forward(stage[0], x)
            y.backward(torch.zeros_like(y))
    return found


def usage(kernel: CompiledKernel) -> tuple[int, int, int]:
    """Registers per thread, bytes of shared memory per program, and bytes of stack and local memory per thread."""
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(kernel.asm['cubin'])
        printed = subprocess.run([tool, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(':') for field in printed.split() if field.count(':') == 1 and field[-1].isdigit())
    return int(fields['REG']), kernel.metadata.shared, int(fields['STACK']) + int(fields['LOCAL'])


def table() -> str:
    rows = []
    for name, cards in sorted(compile_kernels().items()):
        registers, shared, spilled = zip(*(map(max, zip(*map(usage, set(variants)))) for variants in cards))
        rows.append((name, *registers, f'{max(shared) / 1024:.0f}', max(spilled)))
    registers = (f'registers: sm_{capability}' for capability in CAPABILITIES)
    return markdown_table(('kernel', *registers, 'shared memory, KiB', 'spills, bytes'), rows)


if __name__ == '__main__':
    print(table())
