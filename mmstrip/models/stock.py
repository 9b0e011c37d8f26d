"""Whether layers are stock: as the network was built. Whatever folds or replaces a computation asks this first."""

from collections.abc import Callable

from torch import Tensor, nn

from .channel_mixing import GlobalResponseNorm
from .strip_mixing import RelativePosition, StripMLPLayer

PLAIN = (Tensor, nn.Parameter)
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
STATE = (*HOOKS, '_parameters', '_buffers', '_modules')  # module attributes that this file and ops read


def class_of(module: nn.Module) -> type:
    """A module's class, or the ``reference`` that the class computes the same as."""
    kind = type(module)
    return vars(kind).get('reference', kind)  # not inherited: a subclass may compute something else


def replaced_methods(module: nn.Module) -> set[str]:
    """Methods that a module overrides on the instance: patched, compiled, or wrapped by mmengine's checkpointing."""
    return {name for name, value in vars(module).items() if callable(value) and hasattr(type(module), name)}


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module just calls the ``forward`` of its class: no hooks, no overridden methods."""
    return not (any(vars(module)[name] for name in HOOKS) or replaced_methods(module))


class Stock:
    """What a stock layer looks like.

    Args:
        kind: Its exact class.
        tensors: Names of parameters and buffers that it must have.
        optional: Names of those that it may have or that may be None.
        accepts: Whether its hyperparameters are the network's.
    """

    def __init__(
        self,
        kind: type,
        tensors: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        accepts: Callable[[nn.Module], bool] = lambda layer: True,
    ):
        self.kind, self.tensors, self.optional, self.accepts = kind, set(tensors), {*tensors, *optional}, accepts

    def fits(self, layer: nn.Module | None) -> bool:
        if layer is None or class_of(layer) is not self.kind or not is_untouched(layer):
            return False
        tensors = own_tensors(layer)
        plain = all(type(tensor) in PLAIN for tensor in tensors.values())
        return plain and self.tensors <= tensors.keys() <= self.optional and self.accepts(layer)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers that are not None."""
    state = vars(module)
    named = {**state['_parameters'], **state['_buffers']}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def sequence(*layers) -> dict:
    """An ``nn.Sequential`` of layers."""
    return {str(i): layer for i, layer in enumerate(layers)}


def depthwise(*kernel_size: int) -> Stock:
    """A depthwise convolution without bias that preserves the map's size."""

    def accepts(conv: nn.Conv2d) -> bool:
        return conv.in_channels == conv.out_channels == conv.groups and _convolves(conv, kernel_size)

    return Stock(nn.Conv2d, ('weight',), accepts=accepts)


def pointwise(bias: bool | None) -> Stock:
    """A 1x1 convolution, with (True) or without (False) bias, or either (None)."""
    tensors, optional = (('weight', 'bias'), ()) if bias else (('weight',), ('bias',) if bias is None else ())
    return Stock(nn.Conv2d, tensors, optional, lambda conv: conv.groups == 1 and _convolves(conv, (1, 1)))


def _convolves(conv: nn.Conv2d, kernel_size: tuple[int, int]) -> bool:
    """Whether a convolution has that kernel size and zero padding that preserves the map's size."""
    return (
        conv.kernel_size == kernel_size
        and conv.padding == tuple(side // 2 for side in kernel_size)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == 'zeros'
    )


batch_norm = Stock(
    nn.BatchNorm2d,
    ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'),
    accepts=lambda norm: norm.affine and norm.track_running_stats and norm.momentum is not None,
)
layer_norm = Stock(
    nn.LayerNorm,
    optional=('weight', 'bias'),
    accepts=lambda norm: len(norm.normalized_shape) == 1 and (norm.weight is None) == (norm.bias is None),
)
linear = Stock(nn.Linear, ('weight', 'bias'))
gelu = Stock(nn.GELU, accepts=lambda act: act.approximate == 'none')
identity = Stock(nn.Identity)
strip_layer = Stock(StripMLPLayer, ('weight', 'bias'))
position = Stock(RelativePosition, ('table',))
response_norm = Stock(
    GlobalResponseNorm,
    ('gamma',),
    ('beta',),
    lambda grn: grn.gamma.dim() == 1 and (grn.beta is None or grn.beta.shape == grn.gamma.shape),
)
