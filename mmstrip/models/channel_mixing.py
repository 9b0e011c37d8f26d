"""Channel mixing of Strip-MLP (Section 3.1, Figure 2 of the paper)."""

import torch
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import boxes
from ..ops.channel_mlp import response_norm
from ..ops.dispatch import Layer, depthwise, fused, gelu, layer_norm, linear


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

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Normalise (N, H, W, C), by the norm over the tokens that are ``valid`` (N, H, W, 1), or over all."""
        return response_norm(x, self.gamma, self.beta, self.eps, valid)


RESPONSE_NORM = Layer(
    GlobalResponseNorm,
    ('gamma',),
    ('beta',),
    lambda grn: grn.gamma.dim() == 1 and (grn.beta is None or grn.beta.shape == grn.gamma.shape),
)


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

    @fused(
        boxes.channel_mixing,
        boxes.channel_mixing_recompute,
        depthwise=depthwise(7, 7),
        norm=layer_norm,
        fc1=linear,
        act=gelu,
        grn=RESPONSE_NORM,
        fc2=linear,
    )
    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Mix the channels of (N, C, H, W); ``valid``: (N, 1, H, W), False for tokens that GRN's norm leaves out."""
        x = self.depthwise(x).permute(0, 2, 3, 1)  # (N, H, W, C)
        x = self.act(self.fc1(self.norm(x)))
        x = self.grn(x) if valid is None else self.grn(x, valid=valid.permute(0, 2, 3, 1))
        return self.fc2(x).permute(0, 3, 1, 2)
