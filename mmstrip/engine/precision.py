"""Mixed precision on CPUs and GPUs: the option ``--amp`` of the tools, and autocast for a model's networks."""

import argparse
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import TestLoop
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import ops
from ..registry import LOOPS, OPTIM_WRAPPERS
from ..utils.config import name_of
from ..utils.wrappers import unwrap_model

_CPU_WRAPPER = 'mmstrip.BFloat16OptimWrapper'

_lock = threading.Lock()
_patches: dict[nn.Module, list] = {}  # network under autocast -> number of uses, and its own attribute forward
_thread = threading.local()  # dtypes: network -> dtype, in this thread


@contextmanager
def mixed_precision(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Run the networks of a toolbox's model under autocast with float32 outputs, in this thread only.

    Losses, boxes, NMS and metrics stay in float32: with autocast around a whole detector, mmcv's NMS and RoIAlign fail
    on CPUs, scores keep two digits, and NumPy has no bfloat16. Inferencers work too:
    ``with mixed_precision(inferencer.model): inferencer(images)``.

    Args:
        model: A classifier, detector or segmentor, wrapped or not.
        dtype: Autocast dtype. Defaults to ``torch.bfloat16``. Threads that run at the same time must use the same one,
            because they share autocast's cache of weights.
    """
    networks = set(_networks(unwrap_model(model)))
    before = getattr(_thread, 'dtypes', {})
    with _lock:
        for network in networks:
            _patches.setdefault(network, [0, vars(network).get('forward')])[0] += 1
            if _patches[network][0] == 1:
                network.forward = _under_autocast(network, network.forward)
    _thread.dtypes = before | dict.fromkeys(networks, dtype)
    try:
        yield
    finally:
        _thread.dtypes = before
        with _lock:
            for network in networks:
                _patches[network][0] -= 1
                if _patches[network][0]:
                    continue
                del network.forward
                if (own := _patches.pop(network)[1]) is not None:
                    network.forward = own


def _networks(model: nn.Module) -> Iterator[nn.Module]:
    """Backbone, neck and heads, and submodules that methods of heads call; not modules without parameters.

    Models inside a model, such as a student and its teacher, are searched too.
    """
    for child in model.children():
        if next(child.parameters(), None) is not None:
            whole = isinstance(child, (nn.ModuleList, BaseModel))
            if not whole:
                yield child
            if whole or hasattr(child, 'loss'):
                yield from _networks(child)


def _under_autocast(network: nn.Module, forward: Callable) -> Callable:
    def run(*inputs, **options):
        dtype = getattr(_thread, 'dtypes', {}).get(network)
        device = next(network.parameters()).device.type
        if dtype is None or torch.is_autocast_enabled(device):  # called in another thread, or inside another network
            return forward(*inputs, **options)
        with torch.autocast(device, dtype):
            outputs = forward(*inputs, **options)
        return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype is dtype else x, outputs)

    return run


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper with the model's networks in bfloat16.

    mmengine's AmpOptimWrapper rejects CPUs, because its loss scaler needs CUDA. bfloat16 has the range of float32, so
    gradients need no scaling. Weights, gradients and the optimizer state stay in float32.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), mixed_precision(model):
            yield


@LOOPS.register_module()
class MixedPrecisionTestLoop(TestLoop):
    """mmengine's TestLoop with the model's networks in ``dtype``, 'bfloat16' (default) or 'float16'."""

    def __init__(self, *args, dtype: str = 'bfloat16', **kwargs):
        super().__init__(*args, **kwargs)
        self.dtype = getattr(torch, dtype)

    def run_iter(self, idx: int, data_batch: dict | tuple | list) -> None:
        with mixed_precision(self.runner.model, self.dtype):
            super().run_iter(idx, data_batch)


def add_amp_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--amp``."""
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16' if torch.cuda.is_available() else 'bfloat16',
        choices=('float16', 'bfloat16', 'auto'),
        help='automatic mixed precision: float16 (default on GPUs), bfloat16 (default on CPUs), or auto: bfloat16 on '
        'CPUs that are faster with it, float32 otherwise',
    )


def amp_dtype(name: str | None) -> str | None:
    """Resolve a value of ``--amp`` on this machine: 'float16', 'bfloat16', or None for float32.

    'auto' is bfloat16 on CPUs whose compiled operators support it, float32 otherwise, and prints which.

    Raises:
        ValueError: float16 without a GPU.
    """
    if name == 'float16' and not torch.cuda.is_available():
        raise ValueError('--amp float16 needs a GPU, but none is available; use --amp bfloat16 on CPUs')
    if name != 'auto':
        return name
    # A rule, not a measurement, because a resumed run must choose the same.
    faster = not torch.cuda.is_available() and ops.takes(torch.bfloat16)
    print(f'--amp auto: {"bfloat16, the faster one on this CPU" if faster else "float32"}', flush=True)
    return 'bfloat16' if faster else None


def set_train_amp(config: Config, name: str | None) -> None:
    """Make a config train with a value of ``--amp``: with mmengine's AmpOptimWrapper on GPUs, with ours on CPUs.

    Raises:
        ValueError: float16 without a GPU, or ``optim_wrapper`` is missing or of a type with a precision of its own.
    """
    dtype = amp_dtype(name)
    if name is None:
        return
    if not config.get('optim_wrapper'):
        raise ValueError('--amp needs an optim_wrapper, but the config has none')
    wrapper = name_of(config.optim_wrapper.get('type', 'OptimWrapper'))
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper', _CPU_WRAPPER):
        raise ValueError(f"--amp works only with optim_wrapper.type 'OptimWrapper', but the config has {wrapper!r}")
    if dtype and torch.cuda.is_available():
        config.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype)
        # bfloat16 has the range of float32, so gradients need no scaler, which would wait for the GPU.
        config.optim_wrapper.setdefault('loss_scale', 'dynamic' if dtype == 'float16' else dict(enabled=False))
        return
    for key in ('dtype', 'loss_scale', 'use_fsdp'):  # arguments of AmpOptimWrapper only
        config.optim_wrapper.pop(key, None)
    config.optim_wrapper.type = _CPU_WRAPPER if dtype else 'OptimWrapper'


def set_test_amp(config: Config, name: str | None) -> None:
    """Make a config test with a value of ``--amp``.

    Raises:
        ValueError: float16 without a GPU, or ``test_cfg`` has another type than TestLoop.
    """
    dtype = amp_dtype(name)
    if dtype is None:
        return
    loop = name_of(config.test_cfg.get('type', 'TestLoop'))
    if loop not in ('TestLoop', 'mmstrip.MixedPrecisionTestLoop'):
        raise ValueError(f"--amp works only with test_cfg.type 'TestLoop', but the config has {loop!r}")
    config.test_cfg.update(type='mmstrip.MixedPrecisionTestLoop', dtype=dtype)
