"""Channel mixing of Strip-MLP (Section 3.1, Figure 2 of the paper)."""

import torch
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

    def shifted_bias(self, linear: nn.Linear) -> Tensor:
        """The bias of the linear layer behind, with what that makes of beta."""
        return linear.bias if self.beta is None else torch.addmv(linear.bias, linear.weight, self.beta)


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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Mix the channels of (N, C, H, W), plus a residual of that shape if there is one."""
        x = ops.depthwise(x, self.depthwise.weight)
        return ops.channel_mlp(x, self.norm, self.fc1, self.act, self.grn, self.fc2, residual)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold the affine part of LayerNorm into fc1 and the shift of GRN into fc2."""
        if self.grn.beta is None:
            return
        self.fc2.bias.copy_(self.grn.shifted_bias(self.fc2))
        self.grn.beta = None
        self.fc1.bias.add_(self.fc1.weight @ self.norm.bias)
        self.fc1.weight.mul_(self.norm.weight)
        self.norm = nn.LayerNorm(self.norm.normalized_shape, self.norm.eps, elementwise_affine=False)
