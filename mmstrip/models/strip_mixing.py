"""Token mixing of Strip-MLP: boxes of Figures 2 and 3 of the paper (Cao et al., ICCV 2023, arXiv 2307.11458).

Shapes: N images, C channels, an H x W map. Where the paper and the authors' code differ, this follows the code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import ops
from .windows import run_in_windows

BRANCHES = ('cgsmm', 'lsmm')


class StripMLPLayer(nn.Module):
    """Strip MLP layer (Section 3.2): each token is a weighted sum of the tokens of a strip of neighbouring lines.

    Channels are split into ``num_patches`` patches, channel ``i * num_patches + g`` belonging to patch g. A patch owns
    its weights and its channels share them (Section 3.3). Over rows, with zeros outside the map::

        y[i, g, h, w'] = bias[g, w'] + sum over k, w of weight[g, k, w', w] * x[i, g, h + k - strip_width // 2, w]

    and over columns the same with h and w exchanged. The weights start like those of a convolution over
    ``strip_width * tokens`` inputs.

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

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """Mix (N, C, H, W), plus positions (C, H, W) if there are any, along the layer's axis.

        That side must be ``tokens`` long; the other one may be any.
        """
        return ops.strip_layer(x, self.weight, self.bias, self.axis, position)

    @torch.no_grad()
    def fold_position(self, position: Tensor) -> None:
        """Take what the layer makes of positions (C, H, W), and its bias, as a bias map (C, H, W) from now on."""
        self.bias = nn.Parameter(self(position[None])[0].contiguous())

    def resample_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        """Bring strip weights trained at another extent to this layer's, in place; True if there was need to.

        Weights are interpolated over both token axes and scaled by old / new tokens, so that their sums over a line
        stay what they were; biases are interpolated over their one axis.
        """
        weight, bias = state_dict.get(prefix + 'weight'), state_dict.get(prefix + 'bias')
        if weight is None or bias is None or weight.dim() != 4 or bias.dim() != 2:
            return False
        old, new = weight.shape[3], self.weight.shape[3]
        square = weight.shape[2] == weight.shape[3] == bias.shape[1]
        if old == new or not square or weight.shape[:2] != self.weight.shape[:2]:
            return False
        planes = F.interpolate(weight.float(), (new, new), mode='bicubic', antialias=True) * (old / new)
        state_dict[prefix + 'weight'] = planes.to(weight.dtype)
        lines = F.interpolate(bias.float()[None, :, None], (1, new), mode='bicubic', antialias=True)
        state_dict[prefix + 'bias'] = lines[0, :, 0].contiguous().to(bias.dtype)
        return True

    def extra_repr(self) -> str:
        num_patches, strip_width, _, tokens = self.weight.shape
        return f'tokens={tokens}, num_patches={num_patches}, strip_width={strip_width}, axis={self.axis!r}'


class RelativePosition(nn.Module):
    """Relative positions added to the input of a strip layer: position (h, w) gets ``table[clip(w - h) + span]``.

    While the table can change (training, or a gradient is wanted) it is expanded in each forward. Otherwise the
    expanded map is kept, and renewed by ``eval()``, by loading a state dict and after in-place changes of the table;
    after writing to ``table.data`` in eval mode, call :meth:`refresh`.

    Args:
        channels (int): Channels C of the map.
        extent (tuple): Height and width of the map.
        span (int): Largest offset that has an entry of its own; the table has 2 * span + 1 rows, drawn from a
            truncated normal of standard deviation 0.02.
    """

    def __init__(self, channels: int, extent: tuple[int, int], span: int):
        super().__init__()
        self.extent = tuple(extent)
        self.table = nn.Parameter(torch.empty(2 * span + 1, channels))
        nn.init.trunc_normal_(self.table, std=0.02)
        height, width = extent
        offset = torch.arange(width) - torch.arange(height)[:, None]
        self.register_buffer('index', (offset.clamp(-span, span) + span).flatten(), persistent=False)
        self.register_buffer('expanded', torch.empty(channels, *extent), persistent=False)
        self.refresh()

    def expand(self) -> Tensor:
        """The table as a map (C, H, W), differentiable."""
        # Rows are quicker to collect than columns; this is channels_last memory too.
        return self.table.index_select(0, self.index).unflatten(0, self.extent).permute(2, 0, 1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Renew the kept map from the table."""
        self.expanded = self.expand()
        self._expanded_version = ops.version(self.table)

    def train(self, mode: bool = True):
        super().train(mode)
        if not mode:
            self.refresh()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def forward(self) -> Tensor:
        """The positions, as a map (C, H, W)."""
        if self.training or (self.table.requires_grad and torch.is_grad_enabled()):
            return self.expand()
        if ops.version(self.table) not in (None, self._expanded_version):
            self.refresh()
        return self.expanded

    def resample_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        """Bring a table trained at another extent to this one's span, in place; True if there was need to.

        Rows are interpolated linearly, offset 0 and both ends staying where they are.
        """
        table = state_dict.get(prefix + 'table')
        rows, channels = self.table.shape
        if table is None or table.dim() != 2 or table.shape[0] == rows or table.shape[1] != channels:
            return False
        resampled = F.interpolate(table.float().t()[None], rows, mode='linear', align_corners=True)
        state_dict[prefix + 'table'] = resampled[0].t().contiguous().to(table.dtype)
        return True

    def extra_repr(self) -> str:
        return f'channels={self.table.shape[1]}, extent={self.extent}, span={self.table.shape[0] // 2}'


class CascadeGroupStripMixing(BaseModule):
    """Cascade Group Strip Mixing Module, CGSMM (Section 3.3, Figure 3).

    Rows, then columns (cascade, the paper's choice), or both on the same input (parallel, Table 8)::

        v = GELU(BN(fuse_row([row(u + R_h), u])))
        cascade:  c = column(v + R_w),  out = fuse_column([u, c])
        parallel: c = column(u + R_w),  out = fuse_column([v, c])

    A map of another size than ``extent`` is mixed in overlapping windows (see :mod:`mmstrip.models.windows`); the
    last fusion runs on the whole map.

    Args:
        channels (int): Channels C.
        extent (tuple): Height and width that the strip weights are tied to, in tokens.
        num_patches (int): Channel patches, a divisor of ``channels``.
        strip_width (int): Lines of a strip, odd. Defaults to 3.
        cascade (bool): Cascade or parallel. Defaults to True.
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

    def mix_window(self, u: Tensor) -> Tensor:
        """Row and column mixing of windows (M, C, *extent): c, or [v, c] in parallel form."""
        row = self.row(u, self.position_row and self.position_row())
        (v,) = ops.pointwise_norm_activate((row, u), self.fuse_row.weight, self.fuse_row.bias, self.norm, self.act)
        column = self.column(v if self.cascade else u, self.position_column and self.position_column())
        return column if self.cascade else torch.cat([v, column], dim=1)

    def mix(self, u: Tensor) -> tuple[Tensor, ...]:
        """All but the last fusion of (N, C, H, W), of any H and W: the maps that it fuses, 2 C channels in all."""
        mixed = run_in_windows(self.mix_window, u, self.extent)
        return (u, mixed) if self.cascade else (mixed,)

    def forward(self, u: Tensor) -> Tensor:
        """Mix (N, C, H, W), of any H and W."""
        return ops.pointwise(self.mix(u), self.fuse_column.weight)

    @torch.no_grad()
    def switch_to_deploy(self) -> Tensor:
        """Fold positions into the biases of the strip layers and BN into ``fuse_row``.

        Returns:
            The weights of the last fusion, (C, 2 C), for the layer that takes it over: :meth:`mix` is left.
        """
        self.row.fold_position(self.position_row())
        self.column.fold_position(self.position_column())
        self.position_row = self.position_column = None
        self.fuse_row, self.norm = _fold_norm(self.fuse_row, self.norm)
        fuse_column, self.fuse_column = self.fuse_column, None
        return fuse_column.weight.flatten(1)


class LocalStripMixing(BaseModule):
    """Local Strip Mixing Module, LSMM (Section 3.4, Figure 3).

    A tall (7x3) and a wide (3x7) depthwise convolution and the input itself, summed with weights per channel that a
    small MLP draws from their global average (a softmax over the three).

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

    def forward(self, u: Tensor) -> Tensor:
        """Mix (N, C, H, W), of any H and W."""
        return ops.local_strips(u, self.tall.weight, self.wide.weight, self.reweight)


class StripMixingBlock(BaseModule):
    """Strip Mixing Block (Section 3.1, Figure 2): CGSMM mixes the tokens of one half of the channels, LSMM the other.

    BN, GELU, depthwise 3x3; 1x1 convolution, BN, GELU; the branches; concatenation and a 1x1 convolution. With one
    branch only (Table 9) it takes all channels.

    Args:
        channels (int): Channels C.
        extent (tuple): Height and width that the strip weights are tied to, in tokens.
        num_patches (int): Channel patches of CGSMM.
        strip_width (int): Lines of a strip, odd. Defaults to 3.
        cascade (bool): Rows and columns in cascade or in parallel. Defaults to True.
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
        self.deployed = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Mix (N, C, H, W), of any H and W, plus a residual of that shape if there is one."""
        norm, act, depthwise = self.depthwise
        x = ops.norm_activate_depthwise(norm, act, x, depthwise.weight)
        conv, norm, act = self.project
        parts = ops.pointwise_norm_activate((x,), conv.weight, conv.bias, norm, act, chunks=len(self.branches))
        mixed = []
        for (name, branch), part in zip(self.branches.items(), parts):
            mixed += branch.mix(part) if self.deployed and name == 'cgsmm' else (branch(part),)
        return ops.pointwise(mixed, self.fuse.weight, residual=residual)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold BN into ``project``, what CGSMM can fold, and its last fusion into ``fuse``."""
        if self.deployed:
            return
        self.project[0], self.project[1] = _fold_norm(*self.project[:2])
        if 'cgsmm' in self.branches:
            weight = self.fuse.weight.flatten(1)
            last = self.branches['cgsmm'].switch_to_deploy()
            folded = torch.cat([weight[:, : len(last)] @ last, weight[:, len(last) :]], dim=1)
            self.fuse = nn.Conv2d(folded.shape[1], len(folded), 1, bias=False, device=folded.device, dtype=folded.dtype)
            self.fuse.weight.copy_(folded[:, :, None, None])
        self.deployed = True


def _fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution and the norm behind it, which goes into it if it is BN: other norms depend on the input."""
    if not (isinstance(norm, _BatchNorm) and norm.track_running_stats):
        return conv, norm
    return fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.Identity()
