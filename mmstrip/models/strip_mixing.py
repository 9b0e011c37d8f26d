"""Token mixing of Strip-MLP: the modules of Figures 2 and 3 of the paper (Cao et al., ICCV 2023, arXiv 2307.11458).

Shapes: N images, C channels, an H x W map. Where paper and authors' code differ, this follows the code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from .padding import token_mean
from .windows import run_in_windows

BRANCHES = ('cgsmm', 'lsmm')


class StripMLPLayer(nn.Module):
    """Strip MLP layer (Section 3.2): each token is a weighted sum of all tokens of a strip.

    A strip is the token's line (row or column) and the lines beside it. Channels are split into ``num_patches``
    channel patches; channel ``i * num_patches + g`` belongs to patch g. The channels of a patch share its weights, and
    each patch has its own, because weights shared by all channels mix too little in the small maps of deep stages
    (Section 3.3). Over rows, with zeros outside the map::

        y[i, g, h, w'] = bias[g, w'] + sum over k, w of weight[g, k, w', w] * x[i, g, h + k - strip_width // 2, w]

    and over columns the same with h and w exchanged. Weights and bias are initialized uniformly within
    ``1 / sqrt(strip_width * tokens)``.

    Args:
        tokens (int): Tokens of a line, L.
        num_patches (int): Channel patches, G.
        strip_width (int): Lines of a strip, odd. Defaults to 3.
        axis (str): 'row' mixes along W over strips of rows, 'column' along H over strips of columns.
    """

    def __init__(self, tokens: int, num_patches: int, strip_width: int = 3, axis: str = 'row'):
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.empty(num_patches, strip_width, tokens, tokens))
        self.bias = nn.Parameter(torch.empty(num_patches, tokens))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = (self.weight.shape[1] * self.weight.shape[2]) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (N, C, H, W) along the axis; that side must be ``tokens`` long, the other may have any length."""
        num_patches, strip_width = map(int, self.weight.shape[:2])  # torch.jit.trace gives sizes as tensors
        x = x.transpose(2, 3) if self.axis == 'row' else x
        # A grouped convolution over lines, with tokens as channels and patches as groups.
        kernel = self.weight.permute(0, 2, 3, 1).flatten(0, 1)  # (G * tokens, tokens, strip_width)
        lines = x.unflatten(1, (-1, num_patches)).flatten(0, 1).flatten(1, 2)  # (N * C / G, G * tokens, lines)
        folded = self.bias.dim() == 3  # deploy form: the bias is a map (C, H, W)
        bias = None if folded else self.bias.flatten()
        y = F.conv1d(lines, kernel, bias, padding=strip_width // 2, groups=num_patches).reshape(x.shape)
        y = y.transpose(2, 3) if self.axis == 'row' else y
        return y + self.bias if folded else y

    def extra_repr(self) -> str:
        num_patches, strip_width, _, tokens = self.weight.shape
        return f'tokens={tokens}, num_patches={num_patches}, strip_width={strip_width}, axis={self.axis!r}'


class RelativePosition(nn.Module):
    """Relative position embedding, added to the input of a strip layer: ``table[clip(w - h) + span]`` at (h, w).

    Args:
        channels (int): Channels C of the map.
        extent (tuple): Height and width of the map.
        span (int): Largest offset with its own entry. The table has 2 * span + 1 rows, initialized from a truncated
            normal distribution of standard deviation 0.02.
    """

    def __init__(self, channels: int, extent: tuple[int, int], span: int):
        super().__init__()
        self.extent = tuple(extent)
        self.table = nn.Parameter(torch.empty(2 * span + 1, channels))
        nn.init.trunc_normal_(self.table, std=0.02)

    def expand(self) -> Tensor:
        """The embedding as a map (C, H, W), in channels_last memory."""
        height, width = self.extent
        count = int(self.table.shape[0])  # torch.jit.trace gives sizes as tensors
        first, last = count // 2 + 1 - height, count // 2 + width  # rows of the offsets 1 - H to W - 1
        index = torch.arange(first, last, device=self.table.device)
        if first < 0 or last > count:
            index = index.clamp(0, count - 1)
        index = index.unfold(0, width, 1).flip(0)  # row h starts at offset -h
        return self.table.index_select(0, index.flatten()).unflatten(0, self.extent).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedding to (N, C, H, W)."""
        return x + self.expand().to(x.dtype)

    def extra_repr(self) -> str:
        return f'channels={self.table.shape[1]}, extent={self.extent}, span={self.table.shape[0] // 2}'


class CascadeGroupStripMixing(BaseModule):
    """Cascade Group Strip Mixing Module, CGSMM (Section 3.3, Figure 3).

    Rows, then columns (cascade, the paper's choice), or both in parallel (Table 8)::

        v = GELU(BN(fuse_row([row(u + R_h), u])))
        cascade:  c = column(v + R_w),  out = fuse_column([u, c])
        parallel: c = column(u + R_w),  out = fuse_column([v, c])

    A map of another size than ``extent`` is mixed in overlapping windows (:mod:`mmstrip.models.windows`); the last
    fusion runs on the whole map.

    Args:
        channels (int): Channels C.
        extent (tuple): Height and width of the strip weights, in tokens.
        num_patches (int): Channel patches, a divisor of ``channels``.
        strip_width (int): Lines of a strip, odd. Defaults to 3.
        cascade (bool): True: cascade; False: parallel. Defaults to True.
        norm_cfg (dict): Defaults to ``dict(type='BN')``.
        act_cfg (dict): Defaults to ``dict(type='GELU')``.
    """

    def __init__(
        self,
        channels: int,
        extent: tuple[int, int],
        num_patches: int,
        strip_width: int = 3,
        cascade: bool = True,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
    ):
        super().__init__()
        height, width = self.extent = tuple(extent)
        self.cascade = cascade
        self.position_row = RelativePosition(channels, extent, span=height)
        self.row = StripMLPLayer(width, num_patches, strip_width, axis='row')
        self.fuse_row = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.act = build_activation_layer(act_cfg)
        self.position_column = RelativePosition(channels, extent, span=width)
        self.column = StripMLPLayer(height, num_patches, strip_width, axis='column')
        self.fuse_column = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Mix (N, C, H, W) of any H and W."""
        mixed = run_in_windows(self.mix_window, u, self.extent)
        return self.fuse_column(torch.cat([u, mixed], dim=1) if self.cascade else mixed)

    def mix_window(self, u: Tensor) -> Tensor:
        """Row and column mixing of windows (M, C, *extent): c in cascade, [v, c] in parallel."""
        r = self.row(self.position_row(u))
        v = self.act(self.norm(self.fuse_row(torch.cat([r, u], dim=1))))
        c = self.column(self.position_column(v if self.cascade else u))
        return c if self.cascade else torch.cat([v, c], dim=1)


class LocalStripMixing(BaseModule):
    """Local Strip Mixing Module, LSMM (Section 3.4, Figure 3).

    The sum of a tall (7x3) and a wide (3x7) depthwise convolution and the input, with weights per channel that a small
    MLP computes from their global average::

        a, b, c = softmax(reweight(mean of tall(u) + wide(u) + u over H and W))
        out = a * tall(u) + b * wide(u) + c * u

    Args:
        channels (int): Channels C, at least 2.
        act_cfg (dict): Defaults to ``dict(type='GELU')``.
    """

    def __init__(self, channels: int, act_cfg: dict = dict(type='GELU')):
        super().__init__()
        self.tall = nn.Conv2d(channels, channels, (7, 3), padding=(3, 1), groups=channels, bias=False)
        self.wide = nn.Conv2d(channels, channels, (3, 7), padding=(1, 3), groups=channels, bias=False)
        self.reweight = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            build_activation_layer(act_cfg),
            nn.Conv2d(channels // 2, 3 * channels, 1),
        )

    def forward(self, u: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Mix (N, C, H, W) of any H and W; ``valid`` (N, 1, H, W) marks the tokens of the average."""
        tall, wide = self.tall(u), self.wide(u)
        weights = self.reweight(token_mean(tall + wide + u, valid))  # (N, 3 C, 1, 1)
        weights = weights.unflatten(1, (-1, 3)).softmax(dim=2).to(u.dtype)  # autocast computes the softmax in float32
        a, b, c = weights.unbind(dim=2)
        return a * tall + b * wide + c * u


class StripMixingBlock(BaseModule):
    """Strip Mixing Block (Section 3.1, Figure 2): CGSMM mixes the tokens of one half of the channels, LSMM the other.

    BN, GELU, depthwise 3x3; 1x1 convolution, BN, GELU; the branches; concatenation and a 1x1 convolution. A single
    branch (Table 9) gets all channels.

    Args:
        channels (int): Channels C.
        extent (tuple): Height and width of the strip weights, in tokens.
        num_patches (int): Channel patches of CGSMM.
        strip_width (int): Lines of a strip, odd. Defaults to 3.
        cascade (bool): True: rows, then columns; False: in parallel. Defaults to True.
        branches (Sequence[str]): 'cgsmm', 'lsmm' or both. Defaults to both.
        norm_cfg (dict): Defaults to ``dict(type='BN')``.
        act_cfg (dict): Defaults to ``dict(type='GELU')``.
    """

    def __init__(
        self,
        channels: int,
        extent: tuple[int, int],
        num_patches: int,
        strip_width: int = 3,
        cascade: bool = True,
        branches: Sequence[str] = BRANCHES,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
    ):
        super().__init__()
        width = channels // len(branches)
        self.depthwise = nn.Sequential(
            build_norm_layer(norm_cfg, channels)[1],
            build_activation_layer(act_cfg),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        )
        self.project = nn.Sequential(
            nn.Conv2d(channels, channels, 1), build_norm_layer(norm_cfg, channels)[1], build_activation_layer(act_cfg)
        )
        self.branches = nn.ModuleDict()
        if 'cgsmm' in branches:
            self.branches['cgsmm'] = CascadeGroupStripMixing(
                width, extent, num_patches, strip_width, cascade, norm_cfg, act_cfg
            )
        if 'lsmm' in branches:
            self.branches['lsmm'] = LocalStripMixing(width, act_cfg)
        self.fuse = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        """Mix (N, C, H, W) of any H and W; ``valid`` (N, 1, H, W) marks the tokens of LSMM's average."""
        parts = self.project(self.depthwise(x)).chunk(len(self.branches), dim=1)
        return self.fuse(torch.cat(self.mix(parts, **valid), dim=1))

    def mix(self, parts: Sequence[Tensor], **valid: Tensor) -> list[Tensor]:
        """Run each branch on its part of the channels."""
        return [
            branch(part, **valid) if name == 'lsmm' else branch(part)
            for (name, branch), part in zip(self.branches.items(), parts)
        ]
