"""Channel mixing on channel-major maps."""

from torch import Tensor

from ...models import stock
from ...models.channel_mixing import ChannelMixingBlock
from .depthwise import depthwise
from .formula import Formula, linear
from .layer_norm import layer_norm
from .response_norm import gelu_response_norm


class FormulaChannelMixingBlock(Formula, ChannelMixingBlock):
    reference = ChannelMixingBlock
    layers = dict(
        depthwise=stock.depthwise(7, 7),
        norm=stock.layer_norm,
        fc1=stock.linear,
        act=stock.gelu,
        grn=stock.response_norm,
        fc2=stock.linear,
    )

    def may_run(self, x: Tensor) -> bool:
        return super().may_run(x) and self.norm.weight is not None  # it is, but in the deploy form

    def run(self, x: Tensor) -> Tensor:
        x = layer_norm(self.norm, depthwise(x, self.depthwise.weight))
        x = gelu_response_norm(linear(self.fc1.weight, x), self.fc1.bias, self.grn)
        return linear(self.fc2.weight, x, self.fc2.bias)
