"""Compile the Triton kernels of Strip-MLP-T ahead of time, without a card: registers, shared memory and spills.

    python -m benchmarks.gpu.ahead

A block of each stage calls its kernels, which are noted instead of launched, in training in bfloat16.
They are compiled for an A100, an H100 and a B200, and what their binaries say of themselves becomes a table.
"""

import importlib
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmstrip.models import StripMLP
from mmstrip.ops import gpu

MODULES = ('depthwise', 'layer_norm', 'local_strips', 'norm_gelu', 'response_norm', 'strips')
CAPABILITIES = (80, 90, 100)
IMAGES = 8
DTYPES = dict(bfloat16='bf16', float32='fp32', float16='fp16', int64='i64')


class Noted(dict):
    """Kernels and what they were called with, told apart by how Triton compiles them."""

    def launch(self, kernel):
        return _Launch(kernel, self)


class _Launch:
    def __init__(self, kernel, noted: Noted):
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps: int = 4, **constants):
        named = dict(zip(self.kernel.arg_names, args), **constants)
        signature, attributes = {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = named[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = 'constexpr'
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f'*{DTYPES[str(value.dtype).removeprefix("torch.")]}'
            elif isinstance(value, float):
                signature[parameter.name] = 'fp32'
            elif value == 1:  # Triton compiles it in
                signature[parameter.name] = 'constexpr'
                constants[parameter.name] = 1
                continue
            else:
                signature[parameter.name] = 'i32'
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[i,] = [['tt.divisibility', 16]]
        key = self.kernel.fn, tuple(signature.items()), tuple(constants.items()), tuple(attributes), num_warps
        self.noted[key] = ASTSource(self.kernel, signature, constants, attributes), num_warps


def note_kernels(arch: str = 'tiny', dtype: torch.dtype = torch.bfloat16) -> Noted:
    """The kernels of a training step of one block of each stage."""
    noted = Noted()
    modules = [importlib.import_module(f'{gpu.__name__}.{name}') for name in MODULES]
    before = [(module.launch, module.on_card) for module in modules]
    try:
        for module in modules:
            module.launch, module.on_card = noted.launch, lambda x: True
        model = StripMLP(arch).to(dtype)
        for i, stage in enumerate(model.stages):
            side = 56 // 2**i
            x = torch.zeros(IMAGES, model.embed_dims * 2**i, side, side, dtype=dtype, requires_grad=True)
            y = gpu.block_forward(stage[0], x)
            y.backward(torch.zeros_like(y))
    finally:
        for module, (launch, on_card) in zip(modules, before):
            module.launch, module.on_card = launch, on_card
    return noted


def compile_kernel(source: ASTSource, num_warps: int, capability: int) -> dict[str, int]:
    """Registers of a thread, bytes of shared memory, and bytes of a thread's stack and local memory (spills)."""
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=num_warps))
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        printed = subprocess.run([tool, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(field.split(':') for field in printed.split() if field.count(':') == 1 and field[-1].isdigit())
    spilled = int(usage['STACK']) + int(usage['LOCAL'])
    return dict(registers=int(usage['REG']), shared=compiled.metadata.shared, spilled=spilled)


def table(dtype: torch.dtype = torch.bfloat16, capabilities: tuple[int, ...] = CAPABILITIES) -> str:
    """Markdown: of each kernel the most that any of its variants uses, by compute capability."""
    rows: dict[str, dict[int, dict[str, int]]] = {}
    for (function, *_), (source, num_warps) in note_kernels(dtype=dtype).items():
        name = f'{Path(function.__code__.co_filename).stem}: {function.__name__.strip("_")}'
        for capability in capabilities:
            used = compile_kernel(source, num_warps, capability)
            most = rows.setdefault(name, {}).setdefault(capability, used)
            most.update({key: max(most[key], used[key]) for key in used})
    lines = [
        '| kernel |' + ''.join(f' sm_{capability} |' for capability in capabilities),
        '| --- ' * (1 + len(capabilities)) + '|',
    ]
    for name, used in sorted(rows.items()):
        cells = [f'{u["registers"]}, {u["shared"] / 1024:.0f} KiB, {u["spilled"]}' for u in used.values()]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(table())
