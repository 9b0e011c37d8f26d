"""The deploy form: what inference can do without is folded into other layers, and a stage runs as one operator.

Folded layers become identities, so that the forward methods of the boxes stay as they are.
"""

from weakref import WeakKeyDictionary

import torch
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..ops.dispatch import Types, identity, is_stock, is_untouched, layer_norm, linear, native_types, pointwise
from .channel_mixing import RESPONSE_NORM, ChannelMixingBlock
from .strip_mixing import BRANCHES, POSITION, STRIP_LAYER, CascadeGroupStripMixing, StripMixingBlock
from .windows import counts_and_strides

CONV = pointwise(bias=None)
# With what mmengine builds of SyncBN, and turns it to where there is one process.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, _BatchNormXd)
# What folding reads or changes in a block: boxes that stay, whose forward methods it relies on, and layers.
BOXES = {
    'strip_mixing': StripMixingBlock,
    'strip_mixing.branches.cgsmm': CascadeGroupStripMixing,
    'channel_mixing': ChannelMixingBlock,
}
FOLDED = {
    'strip_mixing.project.0': CONV,
    'strip_mixing.fuse': pointwise(bias=False),
    'strip_mixing.branches.cgsmm.position_row': POSITION,
    'strip_mixing.branches.cgsmm.row': STRIP_LAYER,
    'strip_mixing.branches.cgsmm.fuse_row': CONV,
    'strip_mixing.branches.cgsmm.position_column': POSITION,
    'strip_mixing.branches.cgsmm.column': STRIP_LAYER,
    'strip_mixing.branches.cgsmm.fuse_column': pointwise(bias=False),
    'channel_mixing.norm': layer_norm,
    'channel_mixing.fc1': linear,
    'channel_mixing.grn': RESPONSE_NORM,
    'channel_mixing.fc2': linear,
}


@torch.no_grad()
def fold(backbone: nn.Module) -> None:
    """Fold all blocks of a :class:`.strip_mlp.StripMLP`; see its ``switch_to_deploy``.

    Raises:
        ValueError: A layer is not as it was built; nothing is folded then.
    """
    blocks = {block: f'stages.{i}.{j}' for i, stage in enumerate(backbone.stages) for j, block in enumerate(stage)}
    seen: set[int] = set()
    for block, name in blocks.items():
        _check_foldable(name, block, seen)
    for block in blocks:
        _fold_strip_mixing(block.strip_mixing)
        _fold_channel_mixing(block.channel_mixing)


def _check_foldable(name: str, block: nn.Module, seen: set[int]) -> None:
    """Add to ``seen`` what folding changes, which no other block may share."""
    modules = dict(block.named_modules())
    for key in [*BOXES, *FOLDED, *(key for key in modules if key.endswith(('project.1', 'cgsmm.norm')))]:
        if 'cgsmm' in key and 'cgsmm' not in getattr(block.strip_mixing, 'branches', ()):
            continue
        layer = modules.get(key)
        if not _is_foldable(key, layer):
            raise ValueError(
                f'the deploy form cannot fold {name}.{key} ({type(layer).__name__}): it is missing, replaced, wrapped, '
                'parametrised or has hooks; merge or remove adapters, parametrisations and hooks first'
            )
        found = {id(layer), *map(id, layer.parameters())} if key not in BOXES else {id(layer)}
        if found & seen:
            raise ValueError(f'the deploy form cannot fold {name}.{key}: it is shared with another layer')
        seen |= found


def _is_foldable(key: str, layer: nn.Module | None) -> bool:
    if layer is None:
        return False
    if key in BOXES:
        return type(layer) is BOXES[key] and 'forward' not in layer.__dict__
    return FOLDED[key].fits(layer) if key in FOLDED else is_untouched(layer)


def _fold_strip_mixing(mixing: StripMixingBlock) -> None:
    """Fold BN into ``project``, what CGSMM can fold, and its last fusion into ``fuse``; the first norm is left."""
    mixing.depthwise[0] = _local_norm(mixing.depthwise[0])
    mixing.project[0], mixing.project[1] = _fold_norm(*mixing.project[:2])
    if 'cgsmm' not in mixing.branches:
        return
    last = _fold_cgsmm(mixing.branches['cgsmm'])
    weight = mixing.fuse.weight.flatten(1)
    folded = torch.cat([weight[:, : len(last)] @ last, weight[:, len(last) :]], dim=1)[:, :, None, None]
    mixing.fuse = nn.Conv2d(
        folded.shape[1], len(folded), 1, bias=False, device=folded.device, dtype=folded.dtype
    ).requires_grad_(mixing.fuse.weight.requires_grad)
    mixing.fuse.weight.copy_(folded)


def _fold_cgsmm(cgsmm: CascadeGroupStripMixing) -> Tensor:
    """Fold positions into the biases of the strip layers and BN into ``fuse_row``.

    Returns:
        The weights of the last fusion, (C, 2 C), which is left out: CGSMM gives what it fuses.
    """
    for layer, name in ((cgsmm.row, 'position_row'), (cgsmm.column, 'position_column')):
        bias = layer(getattr(cgsmm, name).expand()[None])[0].contiguous()  # a map (C, H, W)
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
        setattr(cgsmm, name, nn.Identity())
    cgsmm.fuse_row, cgsmm.norm = _fold_norm(cgsmm.fuse_row, cgsmm.norm)
    last, cgsmm.fuse_column = cgsmm.fuse_column, nn.Identity()
    return last.weight.flatten(1)


def _local_norm(norm: nn.Module) -> nn.Module:
    """SyncBN as BN, which is the same in inference and known to the operators."""
    if type(norm) not in BATCH_NORMS[1:] or not is_untouched(norm):
        return norm
    local = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, value in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(local, name, value)
    return local.train(norm.training)


def _fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution and the norm after it, which goes into it if it is BN: other norms depend on the input."""
    if type(norm) not in BATCH_NORMS or not norm.track_running_stats:
        return conv, norm
    folded = fuse_conv_bn_eval(conv.eval(), norm.eval())
    folded.bias.requires_grad_(conv.weight.requires_grad)
    return folded, nn.Identity()


def _fold_channel_mixing(mixing: ChannelMixingBlock) -> None:
    """Fold the affine part of LayerNorm into fc1 and the shift of GRN into fc2."""
    if mixing.grn.beta is not None:
        mixing.fc2.bias.add_(mixing.fc2.weight @ mixing.grn.beta)
        mixing.grn.beta = None
    if mixing.norm.elementwise_affine:
        mixing.fc1.bias.add_(mixing.fc1.weight @ mixing.norm.bias)
        mixing.fc1.weight.mul_(mixing.norm.weight)
        mixing.norm = nn.LayerNorm(mixing.norm.normalized_shape, mixing.norm.eps, elementwise_affine=False)


class PackedStage:
    """A stage of the deploy form as one operator, with its weights packed: that takes as much memory again.

    Args:
        stage: Of blocks that are as they were folded.
        tensors: Those of each block, in the order of the operator.
        dtype: Of the maps, as which weights are packed.
    """

    def __init__(self, stage: nn.Sequential, tensors: list[list[Tensor]], types: Types, dtype: torch.dtype):
        self.types, self.dtype = types, dtype
        blocks = list(stage)  # with those that stand there twice
        self.extent = blocks[0].strip_mixing.branches['cgsmm'].extent
        self.operator = torch.classes.mmstrip.Stage(tensors, [_eps(block) for block in blocks], dtype)
        self.blocks = dict(stage._modules)  # not the stage itself, whose end is to be noticed
        self.states = [(module, type(module), _state(module)) for block in blocks for module in block.modules()]
        self.kinds = {base: dict(vars(base)) for _, kind, _ in self.states for base in kind.__mro__[:-1]}

    def is_current(self, stage: nn.Sequential) -> bool:
        """Whether nothing in the stage has changed: no attribute, layer, class, hook or tensor, nor values."""
        try:
            if stage._modules != self.blocks or any(
                type(module) is not kind or module.__dict__ != state for module, kind, state in self.states
            ):
                return False
            if any(vars(kind) != attributes for kind, attributes in self.kinds.items()):  # a class that was patched
                return False
        except (RuntimeError, ValueError):  # another tensor or array, which compares element by element
            return False
        return self.operator.is_current([_tensors(block) for block in self.blocks.values()])

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator.run(x, *counts_and_strides(tuple(x.shape[2:]), self.extent))


def _state(module: nn.Module) -> dict:
    """A module's attributes, with copies of what holds its hooks, tensors and layers."""
    return {name: value.copy() if isinstance(value, (dict, set)) else value for name, value in module.__dict__.items()}


_packed: WeakKeyDictionary[nn.Module, PackedStage | None] = WeakKeyDictionary()


def packed_stage(stage: nn.Sequential, x: Tensor) -> PackedStage | None:
    """What runs a stage on (N, C, H, W) as one operator, or None where its blocks have to be called.

    Weights are packed at the first call, and again when something has changed.
    """
    types = native_types(x)
    if not types:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(value.requires_grad for value in stage.parameters())):
        return None
    packed = _packed.get(stage)
    if packed is None or (packed.types, packed.dtype) != (types, x.dtype) or not packed.is_current(stage):
        packed = _packed[stage] = _pack(stage, types, x.dtype)
    too_small = packed and any(length < side for length, side in zip(x.shape[2:], packed.extent))
    return None if too_small else packed


def _pack(stage: nn.Sequential, types: Types, dtype: torch.dtype) -> PackedStage | None:
    if not all(_is_packable(block, types) for block in stage):
        return None
    extents = {block.strip_mixing.branches['cgsmm'].extent for block in stage}
    return PackedStage(stage, [_tensors(block) for block in stage], types, dtype) if len(extents) == 1 else None


def _is_packable(block: nn.Module, types: Types) -> bool:
    """Whether the operator computes what calling a block of the deploy form does."""
    if not (is_stock(block, 'add_branch', types) and is_stock(block, 'forward', types) and is_untouched(block)):
        return False
    strips, channels = block.strip_mixing, block.channel_mixing
    if not all(is_untouched(box) and is_stock(box, 'forward', types) for box in (strips, channels)):
        return False
    if tuple(strips.branches) != BRANCHES or block.drop_path.training or strips.depthwise[0].training:
        return False
    cgsmm, lsmm = strips.branches.values()
    if not (is_untouched(cgsmm) and cgsmm.cascade):
        return False
    if not all(is_stock(cgsmm, method, types) for method in ('forward', 'mix_window', 'fuse')):
        return False
    if not (is_untouched(lsmm) and is_stock(lsmm, 'forward', types)):
        return False
    left_out = strips.project[1], cgsmm.norm, cgsmm.position_row, cgsmm.position_column, cgsmm.fuse_column
    folded = all(identity.fits(layer) for layer in left_out) and channels.norm.weight is None
    maps = cgsmm.row.bias.dim() == cgsmm.column.bias.dim() == 3
    return folded and maps and channels.grn.beta is None and cgsmm.fuse_row.bias is not None


def _tensors(block: nn.Module) -> list[Tensor]:
    """Tensors of a block in the order of the operator; see csrc/stage.cpp."""
    strips, channels = block.strip_mixing, block.channel_mixing
    norm, _, depthwise = strips.depthwise
    project = strips.project[0]
    cgsmm, lsmm = strips.branches.values()
    narrow, _, broad = lsmm.reweight
    return [
        *(norm.weight, norm.bias, norm.running_mean, norm.running_var, depthwise.weight),
        *(project.weight, project.bias),
        *(cgsmm.row.weight, cgsmm.row.bias, cgsmm.fuse_row.weight, cgsmm.fuse_row.bias),
        *(cgsmm.column.weight, cgsmm.column.bias),
        *(lsmm.tall.weight, lsmm.wide.weight, narrow.weight, narrow.bias, broad.weight, broad.bias),
        strips.fuse.weight,
        *(channels.depthwise.weight, channels.fc1.weight, channels.fc1.bias, channels.grn.gamma),
        *(channels.fc2.weight, channels.fc2.bias),
    ]


def _eps(block: nn.Module) -> list[float]:
    channels = block.channel_mixing
    return [block.strip_mixing.depthwise[0].eps, channels.norm.eps, channels.grn.eps]
