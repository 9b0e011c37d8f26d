"""Channel mixing on channel-major maps, affine parts folded into the linear layers that follow them."""

from torch import Tensor

from ...models import stock
from ...models.channel_mixing import SMALLEST_NORM, ChannelMixingBlock
from .depthwise import depthwise
from .formula import Formula, linear
from .kernels import wide
from .layer_norm import layer_norm


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

    def run(self, x: Tensor, statistics: list) -> Tensor:
        x = layer_norm(depthwise(x, self.depthwise.weight[:, None, 0]), self.norm.eps)
        weight, bias = self.fc1.weight, self.fc1.bias
        if self.norm.weight is not None:
            weight, bias = weight * self.norm.weight, bias + (weight * self.norm.bias).sum(1)
        x = self.act(linear(weight, x, bias))
        norm = x.to(wide(x.dtype)).square().sum((2, 3)).t().contiguous()  # (N, C): channels are averaged next
        norm = norm.clamp_min(SMALLEST_NORM**2).sqrt()
        factor = 1 + self.grn.gamma * (norm / (norm.mean(1, keepdim=True) + self.grn.eps))
        weight, bias = self.fc2.weight, self.fc2.bias
        if self.grn.beta is not None:
            bias = bias + (weight * self.grn.beta).sum(1)
        return linear(weight, x * factor.t()[:, :, None, None].to(x.dtype), bias)
