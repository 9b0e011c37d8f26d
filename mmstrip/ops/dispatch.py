"""What may run in place of the boxes of :mod:`mmstrip.models`, and when.

The ``forward`` of a box is ordinary PyTorch that calls its layers: the reference. An implementation that reads the
parameters of these layers and computes the same in fewer passes over memory may run in its place where nobody can tell
the difference. :func:`fused` asks for that once a call, and nothing else does.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import extension

IMPLEMENTATIONS = ('reference', 'recompute', 'native')
PLAIN = (Tensor, nn.Parameter)
AUTHORS = ('torch', 'mmcv', 'mmstrip')  # packages whose layers implementations know
CONTAINERS = (nn.Sequential, nn.ModuleDict)
Types = tuple[torch.dtype, ...]

_missing = extension.load()  # None, or why there are no operators
_takes_bfloat16 = _missing is None and torch.ops.mmstrip.takes_bfloat16()
_best = 'native'


def available() -> tuple[str, ...]:
    """The implementations that can run in this process: 'reference', 'recompute' and, if compiled, 'native'."""
    return IMPLEMENTATIONS if _missing is None else IMPLEMENTATIONS[:-1]


def status() -> str:
    """One sentence on the compiled operators: what they run and for which instructions, or why they do not."""
    if _missing is not None:
        return f'no compiled operators, the network is slower on CPUs: {_missing}'
    loaded = f'the compiled operators are loaded ({extension.variant()}) and run float32'
    if _takes_bfloat16:
        return f'{loaded} and bfloat16 maps on CPUs'
    return f'{loaded} maps on CPUs; bfloat16 takes the reference, as it needs AVX512-BF16 and PyTorch 2.7'


@contextmanager
def use(best: str) -> Iterator[None]:
    """Within it, run nothing better than one implementation, in all threads.

    Backward passes run as their forward passes did.

    Args:
        best: 'native' (the default everywhere), compiled operators where they can run; 'recompute', functions in
            Python that save memory in training, on GPUs too; 'reference', the modules alone.

    Raises:
        ValueError: There is no such implementation.
        RuntimeError: The compiled operators are asked for, but are not there.
    """
    global _best
    if best not in IMPLEMENTATIONS:
        raise ValueError(f'the implementation must be one of {", ".join(IMPLEMENTATIONS)}, but got {best!r}')
    if best not in available():
        raise RuntimeError(status())
    before, _best = _best, best
    try:
        yield
    finally:
        _best = before


def fused(native: Callable, recompute: Callable | None = None, **layers) -> Callable:
    """Decorator of a box's method: another implementation runs in its place if the box is stock.

    Args:
        native: Called as the method, with the box and its maps; runs on compiled operators.
        recompute: The same without operators, for training on CPUs: it saves less for the backward pass. Optional.
        **layers: What the box's layers must be, by their names; see :class:`Layer`. Layers that are not named must
            not be read by the implementations.
    """

    takes_area = takes_valid(native)  # averages over them are the modules' alone

    def decorate(reference: Callable) -> Callable:
        @functools.wraps(reference)
        def method(box: nn.Module, *maps: Tensor, **area: Tensor) -> Tensor:
            known = not area or takes_area
            types = native_types(*maps) if known else ()
            if types and is_stock(box, reference.__name__, types):
                return native(box, *maps, **area)
            if known and recompute and _recompute_may_run(*maps) and is_stock(box, reference.__name__):
                return recompute(box, *maps, **area)
            return reference(box, *maps, **area)

        method.layers = layers
        return method

    return decorate


def takes_valid(function: Callable) -> bool:
    """Whether a function has the keyword ``valid``, the tokens that averages of a padded batch run over."""
    return 'valid' in inspect.signature(function).parameters


def area_of(valid: Tensor | None) -> dict[str, Tensor]:
    """That keyword, if there are such tokens: a module of one's own need not have it otherwise."""
    return {} if valid is None else dict(valid=valid)


def relied_on(method: Callable) -> Callable:
    """Decorator of a box's method that the implementation of a larger box takes to be as it is written."""
    method.layers = {}
    return method


def is_stock(box: nn.Module, method: str, types: Types | None = None) -> bool:
    """Whether an implementation may run in place of a method of a box.

    Args:
        box: A module.
        method: Name of a method that is decorated by :func:`fused` or :func:`relied_on`.
        types: What parameters must be of, on CPUs, as operators read them. Any will do by default.
    """
    function = type(box).__dict__.get(method)  # not inherited: a subclass may change what the method calls
    layers = getattr(function, 'layers', None)
    if layers is None or method in box.__dict__:
        return False
    for tensor in box._parameters.values():
        if tensor is not None and not _is_plain(tensor, types):
            return False
    return all(_is_as_expected(box._modules.get(name), layer, types) for name, layer in layers.items())


def is_ordinary(*maps: Tensor) -> bool:
    """Whether plain tensors are computed, now and by PyTorch itself: no graph is recorded, nothing is intercepted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch_module._has_any_global_hook():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return False
    # BN refuses one pixel in training.
    return all(type(x) in PLAIN and not x.is_meta and x.dim() == 4 and x.numel() > x.shape[1] for x in maps)


def _recompute_may_run(*maps: Tensor) -> bool:
    # GPUs take longer by it, so that there it must be asked for (docs/gpu.md).
    asked_for = _best == 'recompute' or (_best == 'native' and all(x.is_cpu for x in maps))
    return asked_for and torch.is_grad_enabled() and is_ordinary(*maps)


def in_channels_last(x: Tensor) -> Tensor:
    """A map (N, C, H, W) in channels_last memory, which convolutions keep; as it is under vmap, which has no such."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def native_types(*maps: Tensor) -> Types:
    """What parameters of layers may be of beside these maps, for operators to run in their place.

    Operators take ordinary maps on CPUs, in float32 outside of autocast, or in bfloat16.

    Returns:
        Nothing where the operators do not run.
    """
    if not is_ordinary(*maps) or _best != 'native':  # in this order: compilers must see no more
        return ()
    dtype = maps[0].dtype
    if any(x.dtype is not dtype or not x.is_cpu or x.layout is not torch.strided for x in maps):
        return ()
    types = _parameter_types(dtype)
    if types and _missing is not None:
        _warn_once()
        return ()
    return types


def _parameter_types(dtype: torch.dtype) -> Types:
    autocast = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None
    if dtype is torch.float32 and autocast is None:
        return (torch.float32,)
    if dtype is not torch.bfloat16 or not _takes_bfloat16 or not torch._C._get_mkldnn_enabled():
        return ()
    if autocast is None:
        return (torch.bfloat16,)  # the reference refuses most layers of another type
    return (torch.float32, torch.bfloat16) if autocast is torch.bfloat16 else ()


@functools.cache
def _warn_once() -> None:
    if not extension.is_switched_off():
        warnings.warn(f'mmstrip: {status()}', stacklevel=2)


def _called(kind: type) -> tuple:
    """What calling a layer of a class runs; it, or a class above it, may have been patched."""
    return tuple(getattr(kind, name, None) for name in ('__call__', '_call_impl', 'forward', '_conv_forward'))


class Layer:
    """What a layer must be, for an implementation to compute what its ``forward`` does.

    Args:
        kind: Its very type.
        tensors: Names of its parameters and buffers that must be there.
        optional: Names of those that may be there, or None.
        accepts: Whether its hyperparameters are those that the implementation computes.
    """

    def __init__(
        self,
        kind: type,
        tensors: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        accepts: Callable[[nn.Module], bool] = lambda layer: True,
    ):
        self.kind, self.tensors, self.optional, self.accepts = kind, set(tensors), {*tensors, *optional}, accepts
        self.called = _called(kind)
        self.patched = any(str(one.__module__).partition('.')[0] not in AUTHORS for one in self.called if one)

    def fits(self, layer: nn.Module, types: Types | None = None) -> bool:
        """With ``types`` as of :func:`is_stock`."""
        known = type(layer) is self.kind and not self.patched and _called(self.kind) == self.called
        return known and is_untouched(layer) and self._holds(layer, types) and self.accepts(layer)

    def _holds(self, layer: nn.Module, types: Types | None) -> bool:
        found = set()
        for tensors in (layer._parameters, layer._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if not _is_plain(tensor, types):
                    return False
                found.add(name)
        return self.tensors <= found <= self.optional


def _is_plain(tensor: Tensor, types: Types | None) -> bool:
    if type(tensor) not in PLAIN:
        return False
    if types is None:
        return True
    of_types = tensor.dtype in types or not tensor.is_floating_point()
    return of_types and tensor.is_cpu and tensor.layout is torch.strided


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module is calling the ``forward`` of its class: no hooks, nothing compiled or replaced."""
    state = module.__dict__
    return not (
        state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
        or 'forward' in state
        or '_conv_forward' in state  # of nn.Conv2d
        or state.get('_compiled_call_impl') is not None
    )


def _is_as_expected(layer: nn.Module | None, expected, types: Types | None) -> bool:
    """Whether a layer is what is expected: a Layer, one of several, or a container of layers by their names."""
    if layer is None:
        return False
    if isinstance(expected, Layer):
        return expected.fits(layer, types)
    if isinstance(expected, tuple):
        return any(_is_as_expected(layer, one, types) for one in expected)
    if type(layer) not in CONTAINERS or not is_untouched(layer) or list(layer._modules) != list(expected):
        return False
    return all(_is_as_expected(layer._modules[name], layers, types) for name, layers in expected.items())


def sequence(*layers) -> dict:
    """An ``nn.Sequential`` of layers."""
    return {str(i): layer for i, layer in enumerate(layers)}


def depthwise(*kernel_size: int) -> Layer:
    """A depthwise convolution without bias that keeps the map's size."""

    def accepts(conv: nn.Conv2d) -> bool:
        padding = tuple(side // 2 for side in kernel_size)
        return conv.in_channels == conv.out_channels == conv.groups and _convolves(conv, kernel_size, padding)

    return Layer(nn.Conv2d, ('weight',), accepts=accepts)


def pointwise(bias: bool | None) -> Layer:
    """A 1x1 convolution, with or without bias, or (None) either."""
    tensors = ('weight', 'bias') if bias else ('weight',)
    optional = ('bias',) if bias is None else ()
    return Layer(nn.Conv2d, tensors, optional, lambda conv: conv.groups == 1 and _convolves(conv, (1, 1), (0, 0)))


def _convolves(conv: nn.Conv2d, kernel_size: tuple[int, int], padding: tuple[int, int]) -> bool:
    return (
        conv.kernel_size == kernel_size
        and conv.padding == padding
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == 'zeros'
    )


def _has_exponential_average(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


batch_norm = Layer(
    nn.BatchNorm2d,
    ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'),
    accepts=_has_exponential_average,
)
layer_norm = Layer(
    nn.LayerNorm,
    optional=('weight', 'bias'),
    accepts=lambda norm: len(norm.normalized_shape) == 1 and (norm.weight is None) == (norm.bias is None),
)
linear = Layer(nn.Linear, ('weight', 'bias'))
gelu = Layer(nn.GELU, accepts=lambda act: act.approximate == 'none')
identity = Layer(nn.Identity)
