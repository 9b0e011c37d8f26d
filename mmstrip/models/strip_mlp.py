"""Backbone of "Strip-MLP: Efficient Token Interaction for Vision MLP" (Cao et al., ICCV 2023, arXiv 2307.11458)."""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Integral, Real

import torch
import torch.utils.checkpoint
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.utils import to_2tuple
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..registry import MODELS
from . import whole_blocks
from .channel_mixing import ChannelMixingBlock
from .strip_mixing import BRANCHES, RelativePosition, StripMixingBlock, StripMLPLayer

STEM_STRIDE = 4
NUM_STAGES = 4
# The smallest side that leaves one token in the last stage.
MIN_SIDE = STEM_STRIDE * 2 ** (NUM_STAGES - 1)


class StripMLPBlock(BaseModule):
    """One layer of a stage: strip mixing, then channel mixing, each with a residual and stochastic depth.

    Args:
        channels (int): Channels C.
        extent (tuple): Height and width that the strip weights are tied to, in tokens.
        mlp_ratio (float): Hidden channels of the channel mixing over C. Defaults to 3.
        drop_path (float): Probability that a residual branch is dropped for an image. Defaults to 0.
        **strip_mixing: Further arguments of :class:`StripMixingBlock`.
    """

    def __init__(
        self, channels: int, extent: tuple[int, int], mlp_ratio: float = 3.0, drop_path: float = 0.0, **strip_mixing
    ):
        super().__init__()
        self.strip_mixing = StripMixingBlock(channels, extent, **strip_mixing)
        self.channel_mixing = ChannelMixingBlock(channels, mlp_ratio, strip_mixing['act_cfg'])
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        whole = None if self.training else whole_blocks.run([self], x)
        if whole is not None:
            return whole
        for mixing in (self.strip_mixing, self.channel_mixing):
            if self.training:
                # What drop path makes of a one for each image: 0 or 1 / (1 - drop_path), in one pass with the sum.
                x = torch.addcmul(x, mixing(x), self.drop_path(x.new_ones(len(x), 1, 1, 1)))
            else:
                x = mixing(x, residual=x)
        return x


@MODELS.register_module()
class StripMLP(BaseModule):
    """Strip-MLP backbone (Figure 2): four stages of :class:`StripMLPBlock`, strides 4, 8, 16 and 32.

    Stage s (from 1) has ``embed_dims * 2 ** (s - 1)`` channels. Besides the output of patch merging, stages 3 and 4
    receive the merged maps of earlier stages through depthwise 2x2 convolutions (cross-stage features).

    The strip weights of a stage are tied to the extent ``img_size / stride``; a map of another size runs in
    overlapping windows of that extent (:mod:`mmstrip.models.windows`). Loading a checkpoint trained at another
    ``img_size`` resamples its strip weights and position tables, and logs that it did.

    Args:
        arch (str | dict): 'tiny-light', 'tiny', 'small' or 'base' (Strip-MLP-T*, -T, -S, -B), or a dict with
            ``embed_dims`` (int, stage-1 channels), ``depths`` (four ints) and, if wanted, ``num_patches`` and
            ``mlp_ratio`` as below. Defaults to 'tiny'.
        img_size (int | tuple): Training size in pixels, one side or (H, W), multiples of 32. Defaults to 224.
        in_channels (int): Image channels. Defaults to 3.
        strip_width (int): Lines of a strip, odd (Table 6). Defaults to 3.
        num_patches (int | Sequence[int], optional): Channel patches of CGSMM (Table 7), one number for all stages or
            one each, divisors of the channels that CGSMM gets (C / 2, or C without LSMM). Defaults to the authors'
            rule: 2 channels a patch where the stage's channels are a multiple of 80, else 4.
        cascade (bool): CGSMM mixes rows, then columns; False: both on the same input (Table 8). Defaults to True.
        branches (str | Sequence[str]): 'cgsmm', 'lsmm' or both (Table 9). Defaults to both.
        mlp_ratio (float): Hidden over input channels of the channel mixing. Defaults to 3.
        drop_path_rate (float): Stochastic depth, in [0, 1). Defaults to 0.1.
        drop_path_ramp (bool): Grow the rate linearly from 0 in the first block to ``drop_path_rate`` in the last;
            False: the same in all blocks, as the authors do. Defaults to False.
        norm_cfg (dict): Norm layer of the maps. Defaults to ``dict(type='BN')``.
        act_cfg (dict): Activation. Defaults to ``dict(type='GELU')``.
        out_indices (int | Sequence[int]): Stages to output, from 0 (negative: from the end). Stages behind the last
            one are not built. Stage 3 is normalised. Defaults to (3, ).
        frozen_stages (int): -1: none; 0: the patch embedding; n: that and the first n stages, whose BN statistics and
            drop path stand still too. Defaults to -1.
        norm_eval (bool): Keep all BN statistics still in training. Defaults to False.
        with_cp (bool): Recompute the blocks' activations in the backward pass instead of keeping them.
            Defaults to False.
        deploy (bool): Build the form that :meth:`switch_to_deploy` gives, to load its checkpoints.
            Defaults to False.
        init_cfg (dict, optional): Initialization, as of :class:`mmengine.model.BaseModule`. The default is the
            authors': PyTorch's for all layers, a truncated normal (std 0.02) for position tables, 0 for GRN.

    Raises:
        ValueError: An argument is out of its range; the input is not (N, in_channels, H, W) with both sides at least
            32; a state dict is of another arch.

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
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        settings = dict(num_patches=num_patches, mlp_ratio=mlp_ratio)
        settings.update(_parse_arch(arch, self.arch_zoo))
        self.arch = arch
        self.embed_dims = settings['embed_dims']
        self.depths = tuple(settings['depths'])
        self.img_size = _parse_img_size(img_size)
        self.out_indices = _parse_out_indices(out_indices)
        branches = _parse_branches(branches)
        patches = _parse_num_patches(settings['num_patches'], self.embed_dims, branches)
        odd = _is_positive_int(strip_width) and strip_width % 2 == 1
        freezable = _is_int(frozen_stages) and -1 <= frozen_stages <= NUM_STAGES
        _check(_is_positive_int(in_channels), 'in_channels', in_channels, 'a positive int')
        _check(odd, 'strip_width', strip_width, 'an odd positive int')
        ratio, rate = settings['mlp_ratio'], drop_path_rate
        wide = isinstance(ratio, Real) and self.embed_dims * ratio >= 1
        _check(wide, 'mlp_ratio', ratio, 'a number that leaves at least one hidden channel')
        _check(isinstance(rate, Real) and 0 <= rate < 1, 'drop_path_rate', rate, 'a number in [0, 1)')
        _check(freezable, 'frozen_stages', frozen_stages, f'an int from -1 to {NUM_STAGES}')
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.deploy = False

        num_stages = max(self.out_indices) + 1
        channels = [self.embed_dims * 2**i for i in range(num_stages)]
        rates = iter(_drop_path_rates(drop_path_rate, sum(self.depths), drop_path_ramp))

        self.patch_embed = nn.Conv2d(in_channels, channels[0], STEM_STRIDE, STEM_STRIDE, bias=False)
        self.merging = nn.ModuleList(
            nn.Conv2d(channels[i - 1], channels[i], 2, 2, bias=False) for i in range(1, num_stages)
        )
        # Stage i receives the merged maps of stages 1 to i - 1, brought to its size one stage at a time.
        self.cross_stage = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(channels[i - 1], channels[i], 2, 2, groups=channels[i - 1], bias=False) for _ in range(1, i)
            )
            for i in range(num_stages)
        )
        shared = dict(
            mlp_ratio=settings['mlp_ratio'],
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
            self.stages.append(nn.Sequential(*blocks))
        if num_stages == NUM_STAGES:
            self.norm = build_norm_layer(norm_cfg, channels[-1])[1]
        self._freeze_stages()
        # Convolutions only: strip weights are four-dimensional too, but no images.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        if deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Fold all that inference can do without: same features (but for rounding), fewer steps.

        BN goes into the 1x1 convolution before it, positions into the biases of the strip layers, LayerNorm's affine
        part and GRN's shift into the linear layers behind them, CGSMM's last fusion into that of its block. For
        inference: there is no way back, and batch statistics are gone. Checkpoints of this form load into a model
        built with ``deploy=True`` and the same ``img_size``.
        """
        for stage in self.stages:
            for block in stage:
                block.strip_mixing.switch_to_deploy()
                block.channel_mixing.switch_to_deploy()
        self.deploy = True
        self.train(self.training)  # the layers that are new

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images.

        Args:
            x: (N, in_channels, H, W), H and W at least 32.

        Returns:
            One contiguous map (N, embed_dims * 2^i, H / (4 * 2^i), W / (4 * 2^i)) for each stage i of
            ``out_indices``, in their order; sizes are floored at each stride.
        """
        self._check_input(x)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        passed_on = []  # merged maps of earlier stages, at the size of the present one
        for i, stage in enumerate(self.stages):
            merged = x = self.merging[i - 1](x) if i else self.patch_embed(x)
            passed_on = [conv(feature) for conv, feature in zip(self.cross_stage[i], passed_on)]
            for feature in passed_on:
                x = x + feature
            if i:
                passed_on.append(merged)
            x = self._run_stage(stage, x)
            maps.append(x)
        if hasattr(self, 'norm'):
            maps[-1] = self.norm(x)
        # mmcv's compiled operators, RoIAlign among them, read memory as NCHW whatever the strides say.
        return tuple(maps[i].contiguous() for i in self.out_indices)

    def _run_stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        whole = whole_blocks.run(stage, x, keep=True) if self.deploy else None
        if whole is not None:
            return whole
        for block in stage:
            x = self._run_block(block, x)
        return x

    def _run_block(self, block: StripMLPBlock, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            contexts = partial(_recompute_contexts, block)
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return block(x)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < MIN_SIDE:
            raise ValueError(
                f'StripMLP takes images of shape (N, {self.in_channels}, H, W) with H and W at least '
                f'{MIN_SIDE}, but got {tuple(x.shape)}'
            )

    def train(self, mode: bool = True):
        """Set training mode, except for frozen stages and, with ``norm_eval``, BN statistics."""
        super().train(mode)
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
        if self.frozen_stages == NUM_STAGES and hasattr(self, 'norm'):
            frozen.append(self.norm)
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, RelativePosition):
                module.refresh()

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rates.

        Args:
            param_name: Name of the parameter, as in the model that holds this backbone.
            prefix: What stands before the backbone's own names, such as 'backbone.'. Defaults to ''.

        Returns:
            The parameter's depth and the number of depths: 0 is the patch embedding, then one for each block (patch
            merging and cross-stage convolutions count with the block they feed), the last is what follows the blocks.
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

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """Refuse other archs; bring strip weights and position tables of another ``img_size`` to this one's."""
        self._check_arch(state_dict, prefix)
        resampled = {
            kind: sum(
                module.resample_state_dict(state_dict, f'{prefix}{name}.')
                for name, module in self.named_modules()
                if isinstance(module, kind)
            )
            for kind in (StripMLPLayer, RelativePosition)
        }
        if any(resampled.values()):
            print_log(
                f'Resampled the weights of {resampled[StripMLPLayer]} strip MLP layers and '
                f'{resampled[RelativePosition]} position tables to img_size {self.img_size}: the checkpoint was '
                'trained at another one.',
                logger='current',
            )
        self._check_shapes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_arch(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Compare what a state dict says of its arch with this model; silent on what it does not say."""
        stem = state_dict.get(f'{prefix}patch_embed.weight')
        if not prefix and state_dict and not set(state_dict) & set(self.state_dict()):
            raise ValueError(
                f'the checkpoint holds nothing of this StripMLP, its first keys are {", ".join(list(state_dict)[:5])}; '
                "that of a whole model needs prefix='backbone.', that of the authors the converter"
            )
        if stem is None or stem.dim() != 4:
            return
        found = dict(in_channels=stem.shape[1], embed_dims=stem.shape[0])
        expected = dict(in_channels=self.in_channels, embed_dims=self.embed_dims)
        blocks = {tuple(key[len(prefix) :].split('.')[1:3]) for key in state_dict if key.startswith(f'{prefix}stages.')}
        if blocks:
            trained = any(key.startswith(f'{prefix}stages.') and key.endswith('.grn.beta') for key in state_dict)
            found['deploy'], expected['deploy'] = not trained, self.deploy
        for i, stage in enumerate(self.stages):
            found[f'depths[{i}]'], expected[f'depths[{i}]'] = sum(index == str(i) for index, _ in blocks), len(stage)
        for name, module in self.named_modules():
            weight = state_dict.get(f'{prefix}{name}.weight')
            if isinstance(module, StripMLPLayer) and weight is not None and weight.dim() == 4:
                key = f'num_patches[{name.split(".")[1]}]'
                found[key], expected[key] = weight.shape[0], module.weight.shape[0]
                found['strip_width'], expected['strip_width'] = weight.shape[1], module.weight.shape[1]
        different = [key for key in found if found[key] != expected[key]]
        if different:
            raise ValueError(
                'the checkpoint is of another arch than this StripMLP: it has '
                + ', '.join(f'{key}={found[key]}' for key in different)
                + ' where the model has '
                + ', '.join(f'{key}={expected[key]}' for key in different)
                + ', so build the model with the arch, num_patches, strip_width and deploy of the checkpoint'
            )

    def _check_shapes(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Refuse what only mlp_ratio, branches or damage can explain, as loaders that are not strict just go on."""
        for key, value in self.state_dict().items():
            found = state_dict.get(prefix + key, value)
            if found.shape != value.shape:
                raise ValueError(
                    f'the checkpoint is of another arch than this StripMLP: {key} has shape {tuple(found.shape)} '
                    f'where the model has {tuple(value.shape)}'
                )


@contextmanager
def _still_statistics(module: nn.Module):
    """Run BN layers in their present mode, but leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _recompute_contexts(block: nn.Module):
    """Contexts of a checkpointed block's forward and of its recomputation, which must not count a batch again."""
    return nullcontext(), _still_statistics(block)


def _check(valid: bool, name: str, got, allowed: str) -> None:
    if not valid:
        raise ValueError(f'{name} must be {allowed}, but got {got!r}')


def _is_int(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_positive_int(value) -> bool:
    return _is_int(value) and value > 0


def _parse_arch(arch: str | dict, zoo: dict[str, dict]) -> dict:
    if isinstance(arch, str):
        _check(arch in zoo, 'arch', arch, f'one of {", ".join(zoo)}, or a dict')
        return zoo[arch]
    required, optional = {'embed_dims', 'depths'}, {'num_patches', 'mlp_ratio'}
    known = isinstance(arch, dict) and required <= set(arch) <= required | optional
    _check(known, 'arch', arch, f'a name or a dict with {sorted(required)} and, if wanted, {sorted(optional)}')
    embed_dims, depths = arch['embed_dims'], arch['depths']
    four = isinstance(depths, Sequence) and len(depths) == NUM_STAGES and all(map(_is_positive_int, depths))
    _check(four, 'depths', depths, f'{NUM_STAGES} positive ints')
    _check(_is_positive_int(embed_dims), 'embed_dims', embed_dims, 'a positive int')
    return arch


def _parse_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = to_2tuple(img_size)
    valid = len(sides) == 2 and all(_is_positive_int(side) and side % MIN_SIDE == 0 for side in sides)
    _check(valid, 'img_size', img_size, f'one side or (H, W) in pixels, multiples of {MIN_SIDE} from {MIN_SIDE} up')
    return tuple(int(side) for side in sides)


def _parse_out_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    valid = len(indices) > 0 and all(_is_int(i) and -NUM_STAGES <= i < NUM_STAGES for i in indices)
    _check(valid, 'out_indices', out_indices, f'one or more ints from {-NUM_STAGES} to {NUM_STAGES - 1}')
    return tuple(i % NUM_STAGES for i in indices)


def _parse_branches(branches: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(branches) if isinstance(branches, Sequence) and not isinstance(branches, str) else (branches,)
    valid = len(names) > 0 and len(set(names)) == len(names) and set(names) <= set(BRANCHES)
    _check(valid, 'branches', branches, f'one or both of {", ".join(BRANCHES)}')
    return names


def _parse_num_patches(num_patches: int | Sequence[int] | None, embed_dims: int, branches: Sequence[str]) -> list[int]:
    """Channel patches of each stage; the authors' rule stands in for None."""
    per_stage = list(num_patches) if isinstance(num_patches, Sequence) else [num_patches] * NUM_STAGES
    _check(len(per_stage) == NUM_STAGES, 'num_patches', num_patches, f'an int or {NUM_STAGES} ints')
    halves = embed_dims % len(branches) == 0 and embed_dims // len(branches) >= 2
    _check(halves, 'embed_dims', embed_dims, 'even and at least 4, to be halved between CGSMM and LSMM')
    if 'cgsmm' not in branches:
        return per_stage
    for i, count in enumerate(per_stage):
        channels = embed_dims * 2**i // len(branches)
        if count is None:
            size = 2 if embed_dims * 2**i % 80 == 0 else 4
            splits = f"such that CGSMM's {channels} channels of stage {i} split into patches of {size}"
            _check(channels % size == 0, 'embed_dims', embed_dims, f'{splits}, or come with num_patches')
            per_stage[i] = channels // size
        else:
            valid = _is_positive_int(count) and channels % count == 0
            allowed = f'divisors of the channels that CGSMM gets ({channels} in stage {i})'
            _check(valid, 'num_patches', num_patches, allowed)
    return per_stage


def _drop_path_rates(rate: float, num_blocks: int, ramp: bool) -> list[float]:
    return torch.linspace(0, rate, num_blocks).tolist() if ramp else [rate] * num_blocks
