"""Whether a device computes what float64 computes on the CPU: maps and gradients of Strip-MLP.

Errors are L2 norms relative to the float64 result: the largest of all maps, and that of all gradients together.
"""

from contextlib import nullcontext
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from mmstrip import accelerate
from mmstrip.analysis.specs import ModelSpec

from ..speed.measuring import DTYPES, allow_tf32
from .iterations import SMALL_ARCH
from .page import attempt

# dtype -> largest error allowed of maps and of gradients: some three times those of `tiny-light` on a CPU, as `base`
# has twice as many blocks; more in float32, as GPUs choose among algorithms of convolutions.
TOLERANCES = {'float32': (1e-4, 3e-4), 'bfloat16': (6e-2, 1e-1), 'float16': (8e-3, 2e-2)}
PRECISIONS = {name: dict(dtype=name) for name in TOLERANCES} | {'deploy': dict(dtype='bfloat16', train=False)}
FORMS = {
    'smaller images, accelerated': dict(scale=(0.5, 1), accelerated=True),
    'larger images, accelerated': dict(scale=(1.19, 1.97), accelerated=True),
    'checkpointing': dict(with_cp=True),
    'channels_last': dict(memory_format=torch.channels_last),
    'CUDA graph': dict(graph=True),
    'bfloat16 weights': dict(dtype='bfloat16', weights='bfloat16', train=False),
    'float16 weights': dict(dtype='float16', weights='float16', train=False),
}


def accelerated(name: str) -> dict[str, dict]:
    """One of :data:`PRECISIONS`, by :func:`mmstrip.accelerate`."""
    return {f'{name}, accelerated': dict(PRECISIONS[name], accelerated=True)}


def compare(ways: dict[str, dict], dry: bool = False, arch: str = 'tiny-light') -> list[dict]:
    """A row of :func:`errors` for each way to run an architecture; in a dry run of the smallest one on the CPU."""
    device = 'cpu' if dry else 'cuda'
    ways = {name: way for name, way in ways.items() if not (dry and 'graph' in way)}
    return [attempt(partial(errors, None if dry else arch, device, **way), way=name) for name, way in ways.items()]


def errors(
    arch: str | None,
    device: str,
    dtype: str = 'float32',
    train: bool = True,
    scale: tuple[float, float] = (1, 1),
    memory_format: torch.memory_format = torch.preserve_format,
    accelerated: bool = False,
    graph: bool = False,
    weights: str = 'float32',
    **arguments,
) -> dict[str, float]:
    """Errors of one way to run a network, without TF32: see :func:`check`.

    Args:
        arch: Of the backbone, or None for the smallest.
        dtype, train: Of products, by autocast or by the weights; training, with gradients, or the deploy form.
        scale: Height and width of the images, relative to the training size.
        memory_format, weights: Of weights and images.
        accelerated, graph: Run by :func:`mmstrip.accelerate`; as a CUDA graph.
        **arguments: Of the backbone.
    """
    images, expected = images_and_outcome(arch, scale, train)
    images = images.to(device, DTYPES[weights], memory_format=memory_format)
    model = build(arch, **arguments).train(train)
    if not train:
        model.switch_to_deploy()
    model.to(device, images.dtype, memory_format=memory_format)
    if accelerated:
        accelerate(model)
    allow_tf32(False)
    called = torch.cuda.make_graphed_callables(model, (images,)) if graph else model

    def call(images: Tensor):
        with torch.autocast(device, DTYPES[dtype]) if dtype != weights else nullcontext():
            return called(images)

    return check(outcome(call, model, images), expected, dtype)


def build(arch: str | None, **arguments) -> nn.Module:
    """A backbone in float32 on the CPU: random weights that all count, the same each time, and no drop path."""
    own = dict(arch=arch) if arch else dict(arch=SMALL_ARCH, img_size=64)
    fixed = dict(out_indices=(0, 1, 2, 3), drop_path_rate=0.0)
    return ModelSpec('', 'mmstrip.StripMLP', own | fixed | arguments).build()


@lru_cache(maxsize=4)
def images_and_outcome(arch: str | None, scale: tuple[float, float], train: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Two images, and the outcome of the modules in float64 on the CPU."""
    shape = (round(one * (224 if arch else 64)) for one in scale)
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    model = build(arch).double().train(train)
    return images, outcome(model, model, images.double())


def outcome(call, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Maps, and in training the gradients of a loss in which each value counts differently, by name."""
    draw = torch.Generator().manual_seed(7)
    with torch.set_grad_enabled(model.training):
        maps = call(images)
        found = {f'map {i}': y.detach() for i, y in enumerate(maps)}
        if model.training:
            weights = (torch.randn(y.shape, generator=draw).to(y.device) / y.numel() ** 0.5 for y in maps)
            sum((y * weight).sum() for y, weight in zip(maps, weights)).backward()
            found |= {f'grad {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def check(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> dict[str, float]:
    """The errors of 'maps' and, in training, of 'gradients'.

    Raises:
        ValueError: One is larger than :data:`TOLERANCES` or not a number.
    """
    if {name: one.shape for name, one in found.items()} != {name: one.shape for name, one in expected.items()}:
        raise ValueError(f'names or shapes differ from those in float64, {list(expected)[:5]}, ...')

    def error(names: list[str]) -> float:
        one, other = (torch.cat([part[name].double().cpu().flatten() for name in names]) for part in (found, expected))
        return ((one - other).norm() / other.norm()).item()

    gradients = [name for name in expected if name.startswith('grad')]
    groups = dict(
        maps=[[name] for name in expected if name not in gradients], gradients=[gradients] if gradients else []
    )
    result = {kind: float(np.max([error(names) for names in lists])) for kind, lists in groups.items() if lists}
    for (kind, largest), allowed in zip(result.items(), TOLERANCES[dtype]):
        if not largest <= allowed:  # NaN is not
            raise ValueError(f'{kind} differ by {largest:.1e} from float64, where {allowed:.0e} is allowed')
    return result
