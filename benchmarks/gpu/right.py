"""Whether a device computes what float64 computes on the CPU, features and gradients, and whether trainings resume.

Errors are L2 norms relative to the float64 result: of each map the largest, and of all gradients together. Nothing in
these functions knows which device they are on; the tests run them too.
"""

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmstrip import accelerate
from mmstrip.analysis.specs import ModelSpec

from .. import CONFIGS, ROOT
from ..speed.measuring import DTYPES, allow_tf32
from . import Setting
from .iterations import SMALL_ARCH

# dtype -> largest error of maps and of the gradients: some three times what `tiny-light` has on a CPU
# (float32 2e-6 and 3e-6, bfloat16 2e-2 and 4e-2, float16 3e-3 and 5e-3), as `base` has twice as many blocks; more in
# float32, as GPUs choose among algorithms of convolutions.
TOLERANCES = {'float32': (1e-4, 3e-4), 'bfloat16': (6e-2, 1e-1), 'float16': (8e-3, 2e-2), 'float64': (1e-10, 1e-9)}
PRECISIONS = {name: dict(dtype=name) for name in ('float32', 'bfloat16', 'float16')}
PRECISIONS['deploy'] = dict(dtype='bfloat16', train=False)
SMALLEST = 'smallest'  # beside the archs of the backbone


class WrongResultError(ValueError):
    """A result that differs more than rounding explains."""


def build(arch: str, **arguments) -> nn.Module:
    """A backbone in float32 on the CPU: random weights that all count, the same each time, and no drop path."""
    own = dict(arch=SMALL_ARCH, img_size=64) if arch == SMALLEST else dict(arch=arch)
    fixed = dict(out_indices=(0, 1, 2, 3), drop_path_rate=0.0)
    return ModelSpec('', 'mmstrip.StripMLP', own | fixed | arguments).build()


@functools.lru_cache(maxsize=4)
def images_and_outcome(arch: str, shape: tuple[int, int], train: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Two images, and what the modules make of them in float64 on the CPU."""
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    model = build(arch).double().train(train)
    return images, outcome(model, model, images.double())


def outcome(call, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Maps, and in training the gradients of a loss in which each value counts differently, by name."""
    with torch.set_grad_enabled(model.training):
        maps = call(images)
        found = {f'map {i}': feature.detach() for i, feature in enumerate(maps)}
        if model.training:
            sum(map(_weighted_mean, maps)).backward()
            found |= {f'grad {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def _weighted_mean(feature: Tensor) -> Tensor:
    wide = feature.to(torch.promote_types(feature.dtype, torch.float32))
    weights = np.random.default_rng(7).standard_normal(feature.shape)
    return (wide * torch.from_numpy(weights).to(wide)).sum() / feature.numel() ** 0.5


def check(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> dict[str, float]:
    """The errors, of 'maps' and 'gradients'.

    Raises:
        WrongResultError: One is larger than :data:`TOLERANCES`, or no number.
    """
    if {name: one.shape for name, one in found.items()} != {name: one.shape for name, one in expected.items()}:
        raise WrongResultError(f'names or shapes differ from those of float64, {list(expected)[:5]}, ...')
    gradients = [name for name in expected if name.startswith('grad')]
    maps = [[name] for name in expected if name not in gradients]
    result = {}
    for kind, groups, allowed in zip(('maps', 'gradients'), (maps, [gradients]), TOLERANCES[dtype]):
        if any(groups):
            result[kind] = error = float(np.max([_error(found, expected, group) for group in groups]))  # NaN stays NaN
            if not error <= allowed:
                raise WrongResultError(f'{kind} differ by {error:.1e} from float64, where {allowed:.0e} is allowed')
    return result


def _error(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> float:
    one, other = (torch.cat([part[name].double().cpu().flatten() for name in names]) for part in (found, expected))
    return ((one - other).norm() / other.norm()).item()


def errors(
    arch: str,
    device: str,
    dtype: str = 'float32',
    train: bool = True,
    shape: tuple[int, int] | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    accelerated: bool = False,
    graph: bool = False,
    weights: str = 'float32',
    **arguments,
) -> dict[str, float]:
    """Errors of one way to run a network, without TF32.

    Args:
        arch, device: Of the backbone, or :data:`SMALLEST`, and where it runs.
        dtype: Of products: by autocast, or that of the weights.
        train: In training, with gradients; else in the deploy form. Defaults to True.
        shape: Of the images. Defaults to the training size.
        memory_format, weights: Memory and type of weights and images.
        accelerated, graph: By :func:`mmstrip.accelerate`; as a CUDA graph.
        **arguments: Of the backbone, such as ``with_cp=True``.

    Raises:
        WrongResultError: They are larger than :data:`TOLERANCES`.
    """
    images, expected = images_and_outcome(arch, shape or ((64, 64) if arch == SMALLEST else (224, 224)), train)
    images = images.to(device, DTYPES.get(weights, torch.float64), memory_format=memory_format)
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


def _all(ways: dict[str, dict], *fixed) -> dict:
    """Errors of each way; all are tried before what has failed is raised."""
    found, failed = {}, []
    for name, way in ways.items():
        try:
            found[name] = errors(*fixed, **way)
        except WrongResultError as error:
            failed.append(f'{name}: {error}')
    if failed:
        raise WrongResultError(f'{"; ".join(failed)}; right: {found}')
    return found


def precisions(
    setting: Setting, arch: str = 'tiny-light', names: Sequence[str] = tuple(PRECISIONS), accelerated: bool = False
) -> dict:
    """One architecture in some of :data:`PRECISIONS`."""
    ways = {name: dict(PRECISIONS[name], accelerated=accelerated) for name in names}
    return _all(ways, SMALLEST if setting.tiny else arch, setting.device)


def forms(setting: Setting) -> dict:
    """Other sizes and layouts, checkpointing, other types of weights, and a CUDA graph."""
    arch, side, last = (SMALLEST, 64, torch.channels_last) if setting.tiny else ('tiny-light', 224, torch.channels_last)
    ways = {
        'smaller images, accelerated': dict(shape=(side // 2, side), accelerated=True),
        'larger images, accelerated': dict(shape=(side + 41, 2 * side - 7), accelerated=True),
        'checkpointing': dict(with_cp=True),
        'channels_last': dict(memory_format=last),
        **({'CUDA graph': dict(graph=True)} if setting.cuda else {}),
        'float64 weights': dict(dtype='float64', weights='float64'),
        'bfloat16 weights': dict(dtype='bfloat16', weights='bfloat16', train=False),
        'float16, channels_last': dict(dtype='float16', weights='float16', train=False, memory_format=last),
    }
    return _all(ways, arch, setting.device)


def resume_after_kill(setting: Setting) -> dict:
    """A training that is killed after its first epoch and resumed ends with the bits of one that nobody disturbs."""
    folder = Path(setting.out) / f'resume-{time.time_ns()}'
    options = ['train_cfg.max_epochs=3', 'train_dataloader.dataset.indices=200', 'val_dataloader.dataset.indices=20']
    options += ['randomness.deterministic=True', 'env_cfg.cudnn_benchmark=False']
    config = CONFIGS / 'strip_mlp' / 'strip-mlp-tiny-light_1xb64_digits-32px.py'
    command = [sys.executable, ROOT / 'tools' / 'train.py', config, '--resume', '--cfg-options', *options, '--work-dir']
    subprocess.run([*command, folder / 'undisturbed'], check=True)
    with subprocess.Popen([*command, folder / 'killed']) as process:
        while not (folder / 'killed' / 'epoch_1.pth').exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    subprocess.run([*command, folder / 'killed'], check=True)
    ends = [torch.load(folder / name / 'epoch_3.pth') for name in ('undisturbed', 'killed')]
    one, other = (tree_leaves((end['state_dict'], end['optimizer']['state'])) for end in ends)
    different = sum(not torch.equal(*map(torch.as_tensor, pair)) for pair in zip(one, other, strict=True))
    if different:
        raise WrongResultError(f'{different} of {len(one)} tensors differ after a resumption')
    return dict(tensors=len(one), different=0)
