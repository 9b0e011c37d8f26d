"""Channel mixing on channel-major maps."""

from torch import Tensor

from ...models import stock
from ...models.channel_mixing import ChannelMixingBlock
from .depthwise import depthwise
from .formula import Weights, is_stock, linear
from .layer_norm import layer_norm
from .response_norm import gelu_response_norm

LAYERS = dict(
    depthwise=stock.depthwise(7, 7),
    norm=stock.layer_norm,
    fc1=stock.linear,
    act=stock.gelu,
    grn=stock.response_norm,
    fc2=stock.linear,
)


def is_channel_mixing(module: ChannelMixingBlock) -> bool:
    """Whether the formula stands for a module; in the deploy form its norm has no weight."""
    return is_stock(module, ChannelMixingBlock, LAYERS) and module.norm.weight is not None


def channel_weights(module: ChannelMixingBlock) -> list[Tensor]:
    """Weights of linear layers."""
    return [module.fc1.weight, module.fc2.weight]


def mix_channels(module: ChannelMixingBlock, x: Tensor, weights: list[Weights]) -> Tensor:
    """The formula of (C, N, H, W), given what :func:`.narrow` makes of the weights."""
    fc1, fc2 = weights
    x = layer_norm(module.norm, depthwise(x, module.depthwise.weight))
    x = gelu_response_norm(linear(fc1, x), module.fc1.bias, module.grn)
    return linear(fc2, x, module.fc2.bias)
