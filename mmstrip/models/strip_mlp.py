"""Strip-MLP: Efficient Token Interaction for Vision MLP (Cao et al., ICCV 2023, arXiv 2307.11458), Figure 2.

Patch embedding, then four stages of blocks, with patch merging between them. A block is a Strip Mixing Block
(:mod:`.strip_mixing`), then a Channel Mixing Block (:mod:`.channel_mixing`).
"""

from collections.abc import Sequence

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..registry import MODELS
from .arguments import (
    NUM_STAGES,
    STEM_STRIDE,
    check_images,
    check_layers,
    check_scalars,
    parse_arch,
    parse_branches,
    parse_img_size,
    parse_num_patches,
    parse_out_indices,
)
from .channel_mixing import ChannelMixingBlock
from .checkpointing import run_checkpointed
from .fold import fold
from .padding import check_averages, image_ends, valid_tokens
from .state_dict import adapt_state_dict, report_coverage, require_pretrained
from .strip_mixing import BRANCHES, StripMixingBlock


class StripMLPBlock(BaseModule):
    """A block of a stage: strip mixing, then channel mixing, each with a residual and stochastic depth.

    Args:
        channels (int): Channels C.
        extent (tuple): Height and width of the strip weights, in tokens.
        mlp_ratio (float): Hidden channels of channel mixing over C. Defaults to 3.
        drop_path (float): Probability of dropping a residual branch, per image. Defaults to 0.
        act_cfg (dict): Defaults to ``dict(type='GELU')``.
        **strip_mixing: Further arguments of :class:`StripMixingBlock`.
    """

    def __init__(
        self,
        channels: int,
        extent: tuple[int, int],
        mlp_ratio: float = 3.0,
        drop_path: float = 0.0,
        act_cfg: dict = dict(type='GELU'),
        **strip_mixing,
    ):
        super().__init__()
        self.strip_mixing = StripMixingBlock(channels, extent, act_cfg=act_cfg, **strip_mixing)
        self.channel_mixing = ChannelMixingBlock(channels, mlp_ratio, act_cfg)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        """Mix (N, C, H, W) of any H and W; ``valid`` (N, 1, H, W) marks the tokens that averages include."""
        x = x + self.drop_path(self.strip_mixing(x, **valid))
        return x + self.drop_path(self.channel_mixing(x, **valid))


class Stage(nn.Sequential):
    """Blocks of one resolution.

    Args:
        *blocks: The blocks, in order.
        with_cp (bool): Recompute the blocks' activations in the backward pass instead of saving them.
            Defaults to False.
    """

    def __init__(self, *blocks, with_cp: bool = False):
        super().__init__(*blocks)
        self.with_cp = with_cp
        self.deploy = False  # True once the blocks are folded

    def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
        """Run the blocks; see :class:`StripMLPBlock` for ``valid``."""
        for block in self:
            checkpoint = self.with_cp and x.requires_grad
            x = run_checkpointed(block, x, **valid) if checkpoint else block(x, **valid)
        return x


@MODELS.register_module()
class StripMLP(BaseModule):
    """Strip-MLP backbone (Figure 2): four stages of :class:`StripMLPBlock`, strides 4, 8, 16 and 32.

    Stage i (from 0) has ``embed_dims * 2 ** i`` channels. Besides the output of patch merging, stages 2 and 3 receive
    the merged maps of earlier stages through depthwise 2x2 convolutions (cross-stage features).

    The strip weights of a stage have the extent ``img_size / stride``; a map of another size runs in overlapping
    windows of that extent (:mod:`mmstrip.models.windows`). Loading a checkpoint trained at another ``img_size``
    resamples its strip weights and position tables, and logs it.

    Args:
        arch (str | dict): 'tiny-light', 'tiny', 'small' or 'base' (Strip-MLP-T*, -T, -S, -B), or a dict with
            ``embed_dims`` (int, channels of stage 0), ``depths`` (four ints) and optionally ``num_patches`` and
            ``mlp_ratio`` as below. Defaults to 'tiny'.
        img_size (int | tuple): Size in pixels that the strip weights are for (that of the checkpoint's training), one
            side or (H, W), multiples of 32. Defaults to 224.
        in_channels (int): Image channels. Defaults to 3.
        strip_width (int): Lines of a strip, odd (Table 6). Defaults to 3.
        num_patches (int | Sequence[int], optional): Channel patches of CGSMM (Table 7), one number for all stages or
            one per stage, divisors of CGSMM's channels (C / 2, or C without LSMM). Defaults to the authors' rule:
            2 channels per patch if the stage's channels are a multiple of 80, else 4.
        cascade (bool): CGSMM mixes rows, then columns; False: both in parallel (Table 8). Defaults to True.
        branches (str | Sequence[str]): 'cgsmm', 'lsmm' or both (Table 9). Defaults to both.
        mlp_ratio (float): Hidden over input channels of channel mixing. Defaults to 3.
        drop_path_rate (float): Stochastic depth, in [0, 1). Defaults to 0.1.
        drop_path_ramp (bool): Grow the rate linearly from 0 in the first block to ``drop_path_rate`` in the last;
            False: the same rate in all blocks, as in the authors' code. Defaults to False.
        norm_cfg (dict): Norm layer of the maps. Defaults to ``dict(type='BN')``.
        act_cfg (dict): Activation. Defaults to ``dict(type='GELU')``.
        out_indices (int | Sequence[int]): Stages to output, from 0 (negative: from the end). Stages after the last
            one are not built. The output of stage 3 is normalized. Defaults to (3, ).
        frozen_stages (int): -1: none; 0: the patch embedding; n: that and the first n stages, in evaluation mode.
            Defaults to -1.
        norm_eval (bool): Freeze all BN statistics in training. Defaults to False.
        with_cp (bool): Recompute the blocks' activations in the backward pass instead of saving them.
            Defaults to False.
        ignore_padding (bool): Exclude padding from the averages of LSMM and GRN. Padding is what is zero in all
            channels at the right and at the bottom, as detectors and segmentors pad normalized images. Modules that
            replace parts of a block must take the keyword ``valid``. Defaults to False, as in the authors' code:
            averages run over the whole map.
        deploy (bool): Build the form that :meth:`switch_to_deploy` gives, to load its checkpoints.
            Defaults to False.
        init_cfg (dict, optional): Initialization, see :class:`mmengine.model.BaseModule`. Defaults to the authors':
            PyTorch's for all layers, a truncated normal (std 0.02) for position tables, 0 for GRN.

    Raises:
        TypeError: The input is not a tensor; ``ignore_padding`` is set and a replaced module does not take ``valid``.
        ValueError: An argument is invalid; the input is not (N, in_channels, H, W) with H and W at least 32; a state
            dict has another arch.

    Examples:
        >>> import torch
        >>> from mmstrip.models import StripMLP
        >>> model = StripMLP('tiny-light', out_indices=(0, 1, 2, 3)).eval()
        >>> for feature in model(torch.rand(1, 3, 224, 224)):
        ...     print(tuple(feature.shape))
        (1, 80, 56, 56)
        (1, 160, 28, 28)
        (1, 320, 14, 14)
        (1, 640, 7, 7)
    """

    arch_zoo = {
        'tiny-light': dict(embed_dims=80, depths=(2, 2, 6, 2)),
        'tiny': dict(embed_dims=80, depths=(2, 2, 12, 2)),
        'small': dict(embed_dims=96, depths=(2, 2, 18, 2)),
        'base': dict(embed_dims=112, depths=(2, 2, 18, 2)),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        strip_width: int = 3,
        num_patches: int | Sequence[int] | None = None,
        cascade: bool = True,
        branches: str | Sequence[str] = BRANCHES,
        mlp_ratio: float = 3.0,
        drop_path_rate: float = 0.1,
        drop_path_ramp: bool = False,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
        out_indices: int | Sequence[int] = (3,),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        ignore_padding: bool = False,
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        parsed = parse_arch(arch, self.arch_zoo)
        if num_patches is not None and parsed.get('num_patches', num_patches) != num_patches:
            raise ValueError(
                f'num_patches is {num_patches!r}, but arch sets it to {parsed["num_patches"]!r}; give only one of them'
            )
        settings = {'num_patches': num_patches, 'mlp_ratio': mlp_ratio, **parsed}
        mlp_ratio = settings['mlp_ratio']
        self.arch = arch
        self.embed_dims = settings['embed_dims']
        self.depths = tuple(settings['depths'])
        self.img_size = parse_img_size(img_size)
        self.out_indices = parse_out_indices(out_indices)
        branches = parse_branches(branches)
        patches = parse_num_patches(settings['num_patches'], self.embed_dims, branches)
        check_scalars(
            in_channels,
            strip_width,
            self.embed_dims,
            mlp_ratio,
            drop_path_rate,
            frozen_stages,
            cascade=cascade,
            drop_path_ramp=drop_path_ramp,
            norm_eval=norm_eval,
            with_cp=with_cp,
            ignore_padding=ignore_padding,
            deploy=deploy,
        )
        check_layers(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.ignore_padding = ignore_padding
        self.deploy = False

        num_stages = max(self.out_indices) + 1
        channels = [self.embed_dims * 2**i for i in range(num_stages)]
        last = sum(self.depths) - 1
        rates = (drop_path_rate * (i / last if drop_path_ramp else 1) for i in range(last + 1))

        # First among the children: tools that fold BN would take it for the norm of the child before it.
        self.norm = build_norm_layer(norm_cfg, channels[-1])[1] if num_stages == NUM_STAGES else None
        self.patch_embed = nn.Conv2d(in_channels, channels[0], STEM_STRIDE, STEM_STRIDE, bias=False)
        self.merging = nn.ModuleList(
            nn.Conv2d(channels[i - 1], channels[i], 2, 2, bias=False) for i in range(1, num_stages)
        )
        # Stage i receives the merged maps of stages 1 to i - 1, downsampled once per stage.
        self.cross_stage = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(channels[i - 1], channels[i], 2, 2, groups=channels[i - 1], bias=False) for _ in range(1, i)
            )
            for i in range(num_stages)
        )
        shared = dict(
            mlp_ratio=mlp_ratio,
            strip_width=strip_width,
            cascade=cascade,
            branches=branches,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
        )
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            extent = tuple(side // (STEM_STRIDE * 2**i) for side in self.img_size)
            blocks = [
                StripMLPBlock(channels[i], extent, drop_path=next(rates), num_patches=patches[i], **shared)
                for _ in range(self.depths[i])
            ]
            self.stages.append(Stage(*blocks, with_cp=with_cp))
        self._freeze_stages()
        if deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Fold layers for inference, in place and for good: the same features up to rounding, in fewer steps.

        BN is folded into the 1x1 convolution before it, position embeddings into the biases of the strip layers,
        LayerNorm's affine part and GRN's shift into the linear layers after them, and CGSMM's last fusion into that of
        its block. Checkpoints of this form load into a model built with ``deploy=True`` and the same ``img_size``.

        Raises:
            ValueError: A layer to be folded is replaced, wrapped, parametrized, shared or has hooks; nothing is folded.
        """
        if self.deploy:
            return
        fold(self)
        self.deploy = True
        self.train(self.training)  # also the new layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract features of images.

        Args:
            x: (N, in_channels, H, W), H and W at least 32.

        Returns:
            One contiguous map (N, embed_dims * 2^i, H / (4 * 2^i), W / (4 * 2^i)) per stage i of ``out_indices``, in
            that order; sizes are floored at each stride.
        """
        check_images(x, self.in_channels)
        x = _channels_last(x)
        ends = image_ends(x) if self.ignore_padding else None
        maps, earlier = [], []
        for i, stage in enumerate(self.stages):
            x, earlier = self.merge(i, x, earlier)
            x = stage(x, **valid_tokens(ends, x, STEM_STRIDE * 2**i))
            maps.append(x)
        maps[-1] = x if self.norm is None else self.norm(x)
        # mmcv's compiled operators, such as RoIAlign, ignore strides and read memory as NCHW.
        return tuple(maps[i].contiguous() for i in self.out_indices)

    def merge(self, i: int, x: Tensor, earlier: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Patch embedding (stage 0) or patch merging plus cross-stage features (stages 1 to 3).

        Args:
            i: Index of the stage, from 0.
            x: Images, or the output of the previous stage.
            earlier: Merged maps of stages 1 to i - 1, at the size of ``x``.

        Returns:
            The input of stage i, and the merged maps of stages 1 to i, at its size.
        """
        x, earlier = merge_maps(self.merging[i - 1] if i else self.patch_embed, self.cross_stage[i], x, earlier)
        return x, earlier if i else []

    def train(self, mode: bool = True) -> 'StripMLP':
        """Set training mode, except for frozen stages and, with ``norm_eval``, BN."""
        super().train(mode)
        if self.ignore_padding:
            check_averages(self.stages)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed]
        for i in range(min(self.frozen_stages, len(self.stages))):
            frozen += [self.stages[i], self.cross_stage[i]] + ([self.merging[i - 1]] if i else [])
        if self.frozen_stages == NUM_STAGES and self.norm is not None:
            frozen.append(self.norm)
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rates.

        Args:
            param_name: Name of the parameter, as in the model that holds this backbone.
            prefix: Prefix of the backbone's parameters, such as 'backbone.'. Defaults to ''.

        Returns:
            The parameter's depth and the number of depths. Depth 0 is the patch embedding; each block is one depth,
            with the patch merging and cross-stage convolutions that feed it; the last is everything after the blocks.
        """
        num_depths = sum(map(len, self.stages)) + 2
        kind, *index = param_name[len(prefix) :].split('.') if param_name.startswith(prefix) else ['']
        if kind == 'patch_embed':
            return 0, num_depths
        first = {'stages': 0, 'cross_stage': 0, 'merging': 1}
        if kind not in first:
            return num_depths - 1, num_depths
        stage = int(index[0]) + first[kind]
        block = int(index[1]) if kind == 'stages' else 0
        return 1 + sum(self.depths[:stage]) + block, num_depths

    def init_weights(self) -> None:
        """Initialize from ``init_cfg``.

        Raises:
            FileNotFoundError: Its checkpoint is missing.
        """
        require_pretrained(self.init_cfg)
        super().init_weights()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """Refuse another arch; resample strip weights and position tables of another ``img_size``."""
        adapt_state_dict(self, state_dict, prefix)
        report_coverage(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def merge_maps(
    merging: nn.Module, cross_stage: nn.ModuleList, x: Tensor, earlier: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Compute the input of a stage.

    Args:
        merging: Patch embedding or patch merging, with stride s.
        cross_stage: One convolution per map of ``earlier``, with stride s.
        x: Images, or the output of the previous stage, (N, C, H, W).
        earlier: Merged maps of earlier stages, at the size of ``x``.

    Returns:
        The sum of ``merging(x)`` and the convolved earlier maps, (N, C', H / s, W / s); and the list of these earlier
        maps followed by ``merging(x)``, which is ``earlier`` for the next stage.
    """
    merged = merging(x)
    earlier = [conv(_nchw_on_gpus(feature)) for conv, feature in zip(cross_stage, earlier)]
    return sum(earlier, merged), [*earlier, merged]


def _channels_last(x: Tensor) -> Tensor:
    """Convert to channels_last, which layers preserve; permuted, as torch.func.vmap has no memory formats."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _nchw_on_gpus(x: Tensor) -> Tensor:
    """Input of a cross-stage convolution; in channels_last, cuDNN computes its gradient channel by channel."""
    return x.contiguous() if x.is_cuda else x
