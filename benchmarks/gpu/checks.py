"""Whether a backbone computes on a device what it computes in float64 on the CPU: features and gradients.

Errors are L2 norms relative to the float64 result: of each map the largest, and of all gradients together.
:mod:`.right` and the tests run these functions alike; nothing in them knows which device they are on.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmstrip import accelerate
from mmstrip.analysis.specs import ModelSpec
from mmstrip.models import StripMLP

from ..speed.measuring import DTYPES, allow_tf32

SMALL_ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1))  # runs in milliseconds
# dtype -> largest error of maps and of the gradients: some three times what `tiny-light` has on a CPU
# (float32 2e-6 and 3e-6, bfloat16 2e-2 and 4e-2, float16 3e-3 and 5e-3), as `base` has twice as many blocks; more in
# float32, as GPUs choose among algorithms of convolutions.
TOLERANCES = {'float32': (1e-4, 3e-4), 'bfloat16': (6e-2, 1e-1), 'float16': (8e-3, 2e-2)}
EXACT = (1e-10, 1e-9)  # of float64 itself


class WrongResultError(ValueError):
    """A result that differs more than rounding explains."""


@dataclass(frozen=True)
class Case:
    """A network and its images.

    Attributes:
        arch: Of the backbone.
        side: Training size in pixels.
        shape: (H, W) of the images; None: the training size.
        batch: Number of images.
        stages: Number of stages that are built.
    """

    arch: str | tuple
    side: int = 224
    shape: tuple[int, int] | None = None
    batch: int = 2
    stages: int = 4

    def build(self, **arguments) -> StripMLP:
        """In float32 on the CPU: random weights that all count, the same each time, and no drop path."""
        arch = dict(self.arch) if isinstance(self.arch, tuple) else self.arch
        fixed = dict(arch=arch, img_size=self.side, out_indices=tuple(range(self.stages)), drop_path_rate=0.0)
        return ModelSpec('', 'mmstrip.StripMLP', {**fixed, **arguments}).build()

    def images(self) -> Tensor:
        shape = self.shape or (self.side, self.side)
        return torch.randn(self.batch, 3, *shape, generator=torch.Generator().manual_seed(1))

    @functools.lru_cache(maxsize=2)  # noqa: B019, cases are as few as architectures
    def expected(self, train: bool) -> dict[str, Tensor]:
        """What the modules give in float64 on the CPU."""
        return outcome(self.build().double(), self.images().double(), train)


def small_case(shape: tuple[int, int] | None = None, stages: int = 4) -> Case:
    """The smallest one, for tests."""
    return Case(tuple(SMALL_ARCH.items()), 64, shape, stages=stages)


def outcome(model: nn.Module, images: Tensor, train: bool = True, call: Callable | None = None) -> dict[str, Tensor]:
    """Maps, and in training the gradients of a loss in all parameters, by name.

    Args:
        model: A backbone, or a module with its parameters.
        images: (N, 3, H, W) on the model's device.
        train: In training mode, with gradients. Defaults to True.
        call: What gives the maps in place of the model, such as its compiled form.
    """
    model.train(train)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        maps = (model if call is None else call)(images)
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        found = {f'map {i}': feature.detach() for i, feature in enumerate(maps)}
        if not train:
            return found
        loss = weighted_mean(maps)
    loss.backward()
    gradients = {f'grad {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **gradients}


def weighted_mean(maps: Sequence[Tensor]) -> Tensor:
    """A loss in which each value counts differently, in at least float32."""
    total = 0
    for feature in maps:
        weights = np.random.default_rng(7).standard_normal(feature.shape)
        wide = feature.to(torch.promote_types(feature.dtype, torch.float32))
        total = total + (wide * torch.from_numpy(weights).to(wide)).sum() / feature.numel() ** 0.5
    return total


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """'maps' and 'gradients'; those of training only where both have them."""
    if found.keys() != expected.keys():
        raise WrongResultError(f'results differ in {sorted(found.keys() ^ expected.keys())[:5]}')
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise WrongResultError(
                f'{name} must have shape {tuple(expected[name].shape)}, but has {tuple(value.shape)}'
            )
    kinds = {
        'maps': [[name] for name in expected if name.startswith('map')],
        'gradients': [[name for name in expected if name.startswith('grad')]],
    }
    return {
        kind: float(np.max([_relative(found, expected, group) for group in groups]))  # NaN stays NaN
        for kind, groups in kinds.items()
        if groups and groups[0]
    }


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor], names: Sequence[str]) -> float:
    one, other = (torch.cat([part[name].double().cpu().flatten() for name in names]) for part in (found, expected))
    return ((one - other).norm() / other.norm()).item()


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: tuple[float, float]) -> dict[str, float]:
    """The errors.

    Args:
        found, expected: Of :func:`outcome`.
        tolerance: Of maps and of gradients.

    Raises:
        WrongResultError: One is larger, or no number.
    """
    result = errors(found, expected)
    for kind, error in result.items():
        allowed = tolerance[kind == 'gradients']
        if not error <= allowed:
            raise WrongResultError(
                f'{kind} differ by {error:.1e} from float64 on the CPU, where {allowed:.0e} is allowed'
            )
    return result


@contextmanager
def full_float32() -> Iterator[None]:
    """Without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        allow_tf32(before)


def precision(case: Case, device: str, dtype: str = 'float32', train: bool = True, **options) -> dict[str, float]:
    """Errors in float32 or under autocast.

    Args:
        case: The network.
        device: Where it runs.
        dtype: 'float32', 'bfloat16' or 'float16'.
        train: In training, with gradients. Defaults to True.
        **options: See :func:`errors_of`.

    Raises:
        WrongResultError: They are larger than :data:`TOLERANCES`.
    """
    return errors_of(case, device, train, TOLERANCES[dtype], autocast=None if dtype == 'float32' else dtype, **options)


def errors_of(
    case: Case,
    device: str,
    train: bool = True,
    tolerance: tuple[float, float] = TOLERANCES['float32'],
    autocast: str | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    accelerated: bool = True,
    deploy: bool = False,
    wrap: Callable[[nn.Module], Callable] = lambda model: model,
    weights: torch.dtype = torch.float32,
    **arguments,
) -> dict[str, float]:
    """Errors of one way to run a network.

    Args:
        case, device, train, tolerance: As above.
        autocast: Name of a type.
        memory_format: Of weights and images.
        accelerated: By :func:`mmstrip.accelerate`. Defaults to True.
        deploy: In the deploy form.
        wrap: Makes of the model what is called, such as its compiled form.
        weights: Type of weights and images.
        **arguments: Of the backbone, such as ``with_cp=True``.
    """
    model = case.build(**arguments).to(device, weights, memory_format=memory_format)
    if deploy:
        model.eval().switch_to_deploy()
    images = case.images().to(device, weights, memory_format=memory_format)
    kind = torch.device(device).type
    lower = torch.autocast(kind, DTYPES[autocast]) if autocast else nullcontext()
    if accelerated:
        accelerate(model)
    called = wrap(model)

    def call(images: Tensor):
        with lower:
            return called(images)

    with full_float32():
        return check(outcome(model, images, train, call), case.expected(train), tolerance)


def compiled_dynamic(cases: Sequence[Case], device: str, backend: str) -> dict[str, float]:
    """The largest errors of one compiled network at the sizes of several cases, in inference."""
    model = cases[0].build().to(device).eval()
    call = torch.compile(model, backend=backend, dynamic=True)
    found = []
    with full_float32():
        for case in cases:
            maps = outcome(model, case.images().to(device), False, call)
            found.append(check(maps, case.expected(False), TOLERANCES['float32']))
    return dict(maps=max(one['maps'] for one in found))


def graphed(case: Case, device: str) -> dict[str, float]:
    """Errors of a training step whose forward and backward passes are CUDA graphs, on other images than captured."""

    def capture(model: nn.Module) -> Callable:
        sample = torch.randn_like(case.images().to(device))
        return torch.cuda.make_graphed_callables(model.train(), (sample,))

    return errors_of(case, device, wrap=capture)


class _NoHostReads(TorchDispatchMode):
    """Refuses what would let the host wait for a device, on CPUs as well, where it costs nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ('_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero'):
            raise WrongResultError(f'{name} lets the host wait for the device')
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Within it, reading a tensor's value raises; on CUDA anything that synchronises the device does."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
    try:
        if before is not None:
            torch.cuda.set_sync_debug_mode('error')
        with _NoHostReads():
            yield
    finally:
        if before is not None:
            torch.cuda.set_sync_debug_mode(before)


STEP_METHODS = ('before_train_iter', 'after_train_iter')


def guard_hooks(runner: Runner) -> list[str]:
    """Let our hooks run under :func:`no_host_reads` in the iterations of a training; their names.

    Saves and validations, which happen in some of them, are not guarded.
    """
    guarded = [hook for hook in runner._hooks if type(hook).__module__.startswith('mmstrip.')]
    for hook in guarded:
        for method in STEP_METHODS:
            setattr(hook, method, _guarded(getattr(hook, method)))
    runner.save_checkpoint = _unguarded(runner.save_checkpoint)
    return [type(hook).__name__ for hook in guarded]


def _guarded(method: Callable) -> Callable:
    @functools.wraps(method)
    def run(*arguments, **options):
        with no_host_reads():
            return method(*arguments, **options)

    return run


def _unguarded(method: Callable) -> Callable:
    @functools.wraps(method)
    def run(*arguments, **options):
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
        if before is not None:
            torch.cuda.set_sync_debug_mode('default')
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return method(*arguments, **options)
        finally:
            if before is not None:
                torch.cuda.set_sync_debug_mode(before)

    return run


def same_checkpoints(one: dict, other: dict) -> list[str]:
    """Names of weights and states of the optimizer that differ in any bit between two checkpoints."""
    different = [name for name, value in one['state_dict'].items() if not torch.equal(value, other['state_dict'][name])]
    for index, state in one['optimizer']['state'].items():
        for name, value in state.items():
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(other['optimizer']['state'][index][name])):
                different.append(f'optimizer {index} {name}')
    return different
