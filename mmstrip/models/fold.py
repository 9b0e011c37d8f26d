"""The deploy form for inference: norms, position embeddings and one fusion are folded into neighboring layers.

Folded layers become identities, so the forward methods of the modules do not change.
"""

import torch
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import stock
from .channel_mixing import ChannelMixingBlock
from .stock import class_of, is_untouched
from .strip_mixing import CascadeGroupStripMixing, StripMixingBlock

# The last two are what mmengine makes of SyncBN: when building it, and for a single process.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, _BatchNormXd)
# Modules that stay; folding relies on their forward methods.
KEPT = {
    'strip_mixing': StripMixingBlock,
    'strip_mixing.branches.cgsmm': CascadeGroupStripMixing,
    'channel_mixing': ChannelMixingBlock,
}
# Layers that folding reads or changes, and the type that they must have.
FOLDED = {
    'strip_mixing.project.0': stock.pointwise(bias=None),
    'strip_mixing.fuse': stock.pointwise(bias=False),
    'strip_mixing.branches.cgsmm.position_row': stock.position,
    'strip_mixing.branches.cgsmm.row': stock.strip_layer,
    'strip_mixing.branches.cgsmm.fuse_row': stock.pointwise(bias=None),
    'strip_mixing.branches.cgsmm.position_column': stock.position,
    'strip_mixing.branches.cgsmm.column': stock.strip_layer,
    'strip_mixing.branches.cgsmm.fuse_column': stock.pointwise(bias=False),
    'channel_mixing.norm': stock.layer_norm,
    'channel_mixing.fc1': stock.linear,
    'channel_mixing.grn': stock.response_norm,
    'channel_mixing.fc2': stock.linear,
}
# Norms that are folded into the layer before them if they are BN.
NORMS = ('strip_mixing.project.1', 'strip_mixing.branches.cgsmm.norm')


@torch.no_grad()
def fold(backbone: nn.Module) -> None:
    """Fold all blocks of a :class:`.strip_mlp.StripMLP`; see its ``switch_to_deploy``.

    Raises:
        ValueError: A layer is not as it was built; nothing is folded.
    """
    seen: set[int] = set()
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage):
            _check_foldable(f'stages.{i}.{j}', block, seen)
    for stage in backbone.stages:
        for block in stage:
            _fold_strip_mixing(block.strip_mixing)
            _fold_channel_mixing(block.channel_mixing)
        stage.deploy = True


def _check_foldable(name: str, block: nn.Module, seen: set[int]) -> None:
    """Check a block's layers and add them to ``seen``: folding changes them, so no other block may share them."""
    modules = dict(block.named_modules())
    for key in (*KEPT, *FOLDED, *NORMS):
        if 'cgsmm' in key and 'cgsmm' not in getattr(block.strip_mixing, 'branches', ()):
            continue
        layer = modules.get(key)
        if not _is_foldable(key, layer):
            raise ValueError(
                f'the deploy form cannot fold {name}.{key} ({type(layer).__name__}): it is missing, replaced, wrapped, '
                'parametrized or has hooks. Merge or remove adapters, parametrizations and hooks first'
            )
        found = {id(layer), *map(id, layer.parameters())} if key not in KEPT else {id(layer)}
        if found & seen:
            raise ValueError(
                f'the deploy form cannot fold {name}.{key}: another layer shares it, and each needs its own'
            )
        seen |= found


def _is_foldable(key: str, layer: nn.Module | None) -> bool:
    if key in FOLDED:
        return FOLDED[key].fits(layer)
    if key in KEPT:
        if layer is None or class_of(layer) is not KEPT[key] or 'forward' in vars(layer):
            return False
        return KEPT[key] is not CascadeGroupStripMixing or not layer._forward_hooks  # its output changes
    return layer is not None and is_untouched(layer)


def _fold_strip_mixing(mixing: StripMixingBlock) -> None:
    """Fold BN into ``project``, CGSMM, and CGSMM's last fusion into ``fuse``; the first norm stays."""
    for name, layer in list(mixing.depthwise.named_children()):
        setattr(mixing.depthwise, name, _local_norm(layer))
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
    """Fold position embeddings into the biases of the strip layers, and BN into ``fuse_row``.

    Returns:
        The weights (C, 2 C) of ``fuse_column``, which becomes an identity.
    """
    for layer, name in ((cgsmm.row, 'position_row'), (cgsmm.column, 'position_column')):
        bias = layer(getattr(cgsmm, name).expand()[None])[0].contiguous()  # a map (C, H, W)
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
        setattr(cgsmm, name, nn.Identity())
    cgsmm.fuse_row, cgsmm.norm = _fold_norm(cgsmm.fuse_row, cgsmm.norm)
    last, cgsmm.fuse_column = cgsmm.fuse_column, nn.Identity()
    return last.weight.flatten(1)


def _local_norm(norm: nn.Module) -> nn.Module:
    """Replace SyncBN with BN, which computes the same in inference."""
    if type(norm) not in BATCH_NORMS[1:] or not is_untouched(norm):
        return norm
    local = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, value in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(local, name, value)
    return local.train(norm.training)


def _fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """Fold the norm after a convolution into it, if it is BN; other norms depend on the input."""
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
