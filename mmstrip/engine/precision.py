"""Mixed precision on CPUs and GPUs: what ``--amp`` of the tools means, and models' networks under autocast."""

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
_patches: dict[nn.Module, list] = {}  # network under autocast -> how often, and the forward that it has of its own
_here = threading.local()  # dtypes: network -> dtype, in this thread


@contextmanager
def mixed_precision(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Within it, the networks of a toolbox's model run under autocast and return float32, in this thread alone.

    Losses, boxes, NMS and metrics are computed from float32 as ever: under autocast around a whole detector mmcv's NMS
    and RoIAlign fail on CPUs, scores keep two digits, and NumPy has no bfloat16. For inferencers too:
    ``with mixed_precision(inferencer.model): inferencer(images)``.

    Args:
        model: A classifier, detector or segmentor, or one in wrappers.
        dtype: Of products and convolutions. Defaults to ``torch.bfloat16``. Threads that run at the same time must ask
            for the same one, as autocast shares the weights that it has cast among them.
    """
    networks = set(_networks(unwrap_model(model)))
    before = getattr(_here, 'dtypes', {})
    with _lock:
        for network in networks:
            _patches.setdefault(network, [0, vars(network).get('forward')])[0] += 1
            if _patches[network][0] == 1:
                network.forward = _under_autocast(network, network.forward)
    _here.dtypes = before | dict.fromkeys(networks, dtype)
    try:
        yield
    finally:
        _here.dtypes = before
        with _lock:
            for network in networks:
                _patches[network][0] -= 1
                if _patches[network][0]:
                    continue
                del network.forward
                if (own := _patches.pop(network)[1]) is not None:
                    network.forward = own


def _networks(model: nn.Module) -> Iterator[nn.Module]:
    """Backbone, neck and heads, and what methods of heads call; not losses and others without parameters.

    Of models within a model, such as a student and its teacher, the same.
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
        dtype = getattr(_here, 'dtypes', {}).get(network)
        device = next(network.parameters()).device.type
        if dtype is None or torch.is_autocast_enabled(device):  # of another thread, or inside of another network
            return forward(*inputs, **options)
        with torch.autocast(device, dtype):
            outputs = forward(*inputs, **options)
        return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype is dtype else x, outputs)

    return run


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper with the model's networks in bfloat16.

    mmengine's AmpOptimWrapper refuses CPUs, as its loss scaler is of CUDA. bfloat16 has the range of float32, so its
    gradients need no scaling. Weights, their gradients and the optimizer's state are float32.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), mixed_precision(model):
            yield


@LOOPS.register_module()
class MixedPrecisionTestLoop(TestLoop):
    """mmengine's loop over test images with the model's networks in lower precision.

    Args:
        *args, **kwargs: As of TestLoop.
        dtype: 'bfloat16' or 'float16'. Defaults to 'bfloat16'.
    """

    def __init__(self, *args, dtype: str = 'bfloat16', **kwargs):
        super().__init__(*args, **kwargs)
        self.dtype = getattr(torch, dtype)

    def run_iter(self, idx: int, data_batch) -> None:
        with mixed_precision(self.runner.model, self.dtype):
            super().run_iter(idx, data_batch)


def add_amp_option(parser: argparse.ArgumentParser) -> None:
    """The option ``--amp``."""
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16' if torch.cuda.is_available() else 'bfloat16',
        choices=('float16', 'bfloat16', 'auto'),
        help='automatic mixed precision: float16 (GPUs, the default there), bfloat16 (the default on CPUs), or auto: '
        'bfloat16 on CPUs that are faster with it, else float32',
    )


def amp_dtype(name: str | None) -> str | None:
    """The precision that a value of ``--amp`` asks for on this machine, and None for float32.

    Args:
        name: 'float16', 'bfloat16', None, or 'auto': bfloat16 on CPUs where the compiled operators take it, else
            float32; prints which.

    Raises:
        ValueError: float16 without a GPU.
    """
    if name == 'float16' and not torch.cuda.is_available():
        raise ValueError('--amp float16 needs a GPU, and there is none; CPUs take --amp bfloat16')
    if name != 'auto':
        return name
    # By a rule instead of a measurement, as a resumed run must choose what the first one did.
    faster = not torch.cuda.is_available() and ops.takes(torch.bfloat16)
    print(f'--amp auto: {"bfloat16, the faster one on this CPU" if faster else "float32"}', flush=True)
    return 'bfloat16' if faster else None


def set_train_amp(config: Config, name: str | None) -> None:
    """Let a config train in mixed precision: on GPUs by mmengine's AmpOptimWrapper, on CPUs by ours.

    Args:
        config: A whole config.
        name: As of :func:`amp_dtype`.

    Raises:
        ValueError: float16 without a GPU, or an ``optim_wrapper`` of another type, which has a precision of its own.
    """
    dtype = amp_dtype(name)
    if name is None:
        return
    wrapper = name_of(config.optim_wrapper.get('type', 'OptimWrapper'))
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper', _CPU_WRAPPER):
        raise ValueError(f"--amp needs optim_wrapper.type 'OptimWrapper', but got {wrapper!r}")
    if dtype and torch.cuda.is_available():
        config.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype)
        # bfloat16 has the range of float32, so that its gradients need no scaler, which would wait for the GPU.
        config.optim_wrapper.setdefault('loss_scale', 'dynamic' if dtype == 'float16' else dict(enabled=False))
        return
    for key in ('dtype', 'loss_scale', 'use_fsdp'):  # arguments of AmpOptimWrapper alone
        config.optim_wrapper.pop(key, None)
    config.optim_wrapper.type = _CPU_WRAPPER if dtype else 'OptimWrapper'


def set_test_amp(config: Config, name: str | None) -> None:
    """Let a config test in mixed precision.

    Args:
        config: A whole config.
        name: As of :func:`amp_dtype`.

    Raises:
        ValueError: float16 without a GPU, or a ``test_cfg`` of another type.
    """
    dtype = amp_dtype(name)
    if dtype is None:
        return
    loop = name_of(config.test_cfg.get('type', 'TestLoop'))
    if loop not in ('TestLoop', 'mmstrip.MixedPrecisionTestLoop'):
        raise ValueError(f"--amp needs test_cfg.type 'TestLoop', but got {loop!r}")
    config.test_cfg.update(type='mmstrip.MixedPrecisionTestLoop', dtype=dtype)
