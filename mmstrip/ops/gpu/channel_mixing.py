"""Channel mixing on channel-major maps, affine parts folded into the linear layers that follow them."""

import torch
from torch import Tensor

from ...models import stock
from ...models.channel_mixing import SMALLEST_NORM, ChannelMixingBlock
from .compiled import Compiled, channel_major, linear, per_channel
from .depthwise import depthwise


class CompiledChannelMixingBlock(Compiled, ChannelMixingBlock):
    reference = ChannelMixingBlock
    layers = dict(
        depthwise=stock.depthwise(7, 7),
        norm=stock.layer_norm,
        fc1=stock.linear,
        act=stock.gelu,
        grn=stock.response_norm,
        fc2=stock.linear,
    )

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if valid is not None or not self.may_run(x):
            return super().forward(x, valid=valid)
        x = depthwise(channel_major(x), self.depthwise.weight)
        variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), 0, correction=0)
        x = ((x - mean) * (variance + self.norm.eps).rsqrt()).to(x.dtype)
        weight, bias = self.fc1.weight, self.fc1.bias
        if self.norm.weight is not None:
            weight, bias = weight * self.norm.weight, bias + (weight * self.norm.bias).sum(1)
        x = self.act(linear(weight, x, bias))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = wide.square().sum((2, 3), keepdim=True).clamp_min(SMALLEST_NORM**2).sqrt()  # (C, N, 1, 1)
        factor = 1 + per_channel(self.grn.gamma) * (norm / (norm.mean(0, keepdim=True) + self.grn.eps))
        weight, bias = self.fc2.weight, self.fc2.bias
        if self.grn.beta is not None:
            bias = bias + (weight * self.grn.beta).sum(1)
        return linear(weight, x * factor.to(x.dtype), bias).transpose(0, 1)
