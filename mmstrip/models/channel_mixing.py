"""Channel mixing of Strip-MLP (Section 3.1, Figure 2 of the paper)."""

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from . import ops


class GlobalResponseNorm(nn.Module):
    """Global Response Normalization, GRN, of channels-last maps (Woo et al., ConvNeXt V2, CVPR 2023, Section 3.2)::

        g = L2 norm of x over H and W,  y = gamma * x * g / (mean of g over channels + eps) + beta + x

    gamma and beta start at 0, so that the layer starts as the identity.

    Args:
        channels (int): Channels C.
        eps (float): Defaults to 1e-6.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, H, W, C)."""
        return ops.response_norm(x, self.gamma, self.eps) + self.beta


class ChannelMixingBlock(BaseModule):
    """Channel Mixing Block: depthwise 7x7, LayerNorm, linear, GELU, GRN, linear.

    Args:
        channels (int): Channels C.
        mlp_ratio (float): Hidden channels over C. Defaults to 3.
        act_cfg (dict): Defaults to ``dict(type='GELU')``.
    """

    def __init__(self, channels: int, mlp_ratio: float = 3.0, act_cfg: dict = dict(type='GELU')):
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, hidden)
        self.act = build_activation_layer(act_cfg)
        self.grn = GlobalResponseNorm(hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of (N, C, H, W)."""
        x = ops.depthwise(x, self.depthwise.weight).permute(0, 2, 3, 1)  # (N, H, W, C)
        x = self.norm(x)
        weight, bias = self.fc2.weight, self._shifted_bias()
        if ops.is_gelu(self.act):
            expand = self.fc1.weight, self.fc1.bias
            x = ops.channel_mlp(x, expand, self.grn.gamma, self.grn.eps, (weight, bias))
        else:
            x = F.linear(ops.response_norm(self.act(self.fc1(x)), self.grn.gamma, self.grn.eps), weight, bias)
        return x.permute(0, 3, 1, 2)

    def _shifted_bias(self) -> Tensor:
        """The bias of fc2 with what fc2 makes of GRN's shift."""
        if self.grn.beta is None:
            return self.fc2.bias
        return torch.addmv(self.fc2.bias, self.fc2.weight, self.grn.beta)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold the affine part of LayerNorm into fc1 and the shift of GRN into fc2."""
        if self.grn.beta is None:
            return
        self.fc2.bias.copy_(self._shifted_bias())
        self.grn.beta = None
        self.fc1.bias.add_(self.fc1.weight @ self.norm.bias)
        self.fc1.weight.mul_(self.norm.weight)
        self.norm = nn.LayerNorm(self.norm.normalized_shape, self.norm.eps, elementwise_affine=False)
