"""Formula of channel mixing on channel-major maps."""

from torch import Tensor

from ...models.channel_mixing import ChannelMixingBlock
from ..channel_mlp import FastChannelMixingBlock
from .depthwise import depthwise
from .formula import Weights, is_stock, linear
from .layer_norm import layer_norm
from .response_norm import gelu_response_norm


def is_channel_mixing(module: ChannelMixingBlock) -> bool:
    """Whether the formula computes what a module does. It does not for the deploy form, whose norm has no weight."""
    return is_stock(module, ChannelMixingBlock, FastChannelMixingBlock.layers) and module.norm.weight is not None


def channel_weights(module: ChannelMixingBlock) -> list[Tensor]:
    """Weights of the linear layers."""
    return [module.fc1.weight, module.fc2.weight]


def mix_channels(module: ChannelMixingBlock, x: Tensor, weights: list[Weights]) -> Tensor:
    """The formula on (C, N, H, W); ``weights`` are the result of :func:`.narrow`."""
    fc1, fc2 = weights
    x = layer_norm(module.norm, depthwise(x, module.depthwise.weight))
    x = gelu_response_norm(linear(fc1, x), module.fc1.bias, module.grn)
    return linear(fc2, x, module.fc2.bias)
