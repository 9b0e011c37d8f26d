"""Channel mixing of Strip-MLP (Section 3.1, Figure 2 of the paper)."""

import torch
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

SMALLEST_NORM = 1e-12


class GlobalResponseNorm(nn.Module):
    """Global Response Normalization, GRN, of channels-last maps (Woo et al., ConvNeXt V2, CVPR 2023, Section 3.2)::

        g = L2 norm of x over H and W,  y = gamma * x * g / (mean of g over channels + eps) + beta + x

    gamma and beta start at 0, so the layer starts as the identity.

    Args:
        channels (int): Channels C.
        eps (float): Defaults to 1e-6.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Normalize (N, H, W, C), with the norm over the tokens that are ``valid`` (N, H, W, 1), or over all."""
        g = token_norm(x if valid is None else torch.where(valid, x, 0))
        factor = 1 + self.gamma * (g / (g.mean(dim=-1, keepdim=True) + self.eps))
        y = x * factor.to(x.dtype)
        return y if self.beta is None else y + self.beta.to(y.dtype)  # None in the deploy form


def token_norm(x: Tensor) -> Tensor:
    """L2 norm over H and W of (N, H, W, C): (N, 1, 1, C), at least in float32, as squares overflow half precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (
        wide.square().sum(dim=(1, 2), keepdim=True).clamp_min(SMALLEST_NORM**2).sqrt()
    )  # clamped: sqrt has no gradient at 0


class ChannelMixingBlock(BaseModule):
    """Channel Mixing Block (Figure 2): depthwise 7x7, LayerNorm, linear, GELU, GRN, linear.

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

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Mix the channels of (N, C, H, W); ``valid`` (N, 1, H, W) marks the tokens of GRN's norm."""
        x = self.depthwise(x).permute(0, 2, 3, 1)  # (N, H, W, C)
        x = self.act(self.fc1(self.norm(x)))
        x = self.grn(x) if valid is None else self.grn(x, valid=valid.permute(0, 2, 3, 1))
        return self.fc2(x).permute(0, 3, 1, 2)
