"""Conversion of the authors' checkpoints (classification and MLP-DINO): the only place that knows their keys."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import StripMLP
from ..utils.checkpoints import read_checkpoint, write_checkpoint

# Official name of each module -> ours: inside a block, then outside the blocks.
_BLOCK = {
    'token_mixing.dwsc.conv_merge.BN': 'strip_mixing.depthwise.0',
    'token_mixing.dwsc.conv_merge.Conv': 'strip_mixing.depthwise.2',
    'token_mixing.smlp_block.mlp.0': 'strip_mixing.project.0',
    'token_mixing.smlp_block.mlp.1': 'strip_mixing.project.1',
    'token_mixing.smlp_block.relate_pos_h': 'strip_mixing.branches.cgsmm.position_row',
    'token_mixing.smlp_block.proj_h': 'strip_mixing.branches.cgsmm.row',
    'token_mixing.smlp_block.fuse_h': 'strip_mixing.branches.cgsmm.fuse_row',
    'token_mixing.smlp_block.BN': 'strip_mixing.branches.cgsmm.norm',
    'token_mixing.smlp_block.relate_pos_w': 'strip_mixing.branches.cgsmm.position_column',
    'token_mixing.smlp_block.proj_w': 'strip_mixing.branches.cgsmm.column',
    'token_mixing.smlp_block.proh_w': 'strip_mixing.branches.cgsmm.column',  # spelled so in MLP-DINO
    'token_mixing.smlp_block.fuse_w': 'strip_mixing.branches.cgsmm.fuse_column',
    'token_mixing.smlp_block.fc_w': 'strip_mixing.branches.lsmm.tall',
    'token_mixing.smlp_block.fc_h': 'strip_mixing.branches.lsmm.wide',
    'token_mixing.smlp_block.reweight.fc1': 'strip_mixing.branches.lsmm.reweight.0',
    'token_mixing.smlp_block.reweight.fc2': 'strip_mixing.branches.lsmm.reweight.2',
    'token_mixing.smlp_block.fuse': 'strip_mixing.fuse',
    'channel_mixing.conv_77': 'channel_mixing.depthwise',
    'channel_mixing.layer_norm': 'channel_mixing.norm',
    'channel_mixing.fc1': 'channel_mixing.fc1',
    'channel_mixing.grn': 'channel_mixing.grn',
    'channel_mixing.fc2': 'channel_mixing.fc2',
}
_REST = {
    'patch_embed': 'backbone.patch_embed',
    'merging1': 'backbone.merging.0',
    'merging2': 'backbone.merging.1',
    'merging3': 'backbone.merging.2',
    'conv_s1_28': 'backbone.cross_stage.2.0',
    'conv_s1_14': 'backbone.cross_stage.3.0',
    'conv_s2_14': 'backbone.cross_stage.3.1',
    'norm': 'backbone.norm',
    'head': 'head.fc',
}
_SHOWN = 5  # keys named in an error


class Conversion(NamedTuple):
    """A converted checkpoint.

    Attributes:
        kind: 'classification' or 'MLP-DINO'.
        arch: Name in ``StripMLP.arch_zoo``.
        backbone: Arguments that build the backbone the weights belong to.
        state_dict: Keys of an mmpretrain ``ImageClassifier``: ``backbone.*`` and, if there is a head, ``head.fc.*``.
        skipped: Number of tensors outside the backbone of a detector.
    """

    kind: str
    arch: str
    backbone: dict
    state_dict: dict[str, Tensor]
    skipped: int


def convert_official_checkpoint(source: str | Path, target: str | Path, trusted: bool = False) -> Conversion:
    """Convert a checkpoint of the authors and write it atomically.

    Args:
        source: The authors' checkpoint, or its state dict as a ``.safetensors`` file.
        target: File to write: ``{'state_dict': ..., 'meta': ...}``, or safetensors if it ends in ``.safetensors``.
        trusted: Let ``source`` run code. Defaults to False.

    Raises:
        FileNotFoundError: ``source`` or the folder of ``target`` does not exist.
        ValueError: ``source`` cannot be read safely or is not a complete Strip-MLP checkpoint; ``target`` is a folder.
    """
    source, target = Path(source), Path(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f'cannot write {target}: folder {target.parent} does not exist')
    if target.is_dir():
        raise ValueError(f'cannot write {target}: it is a folder, not a file')
    checkpoint = read_checkpoint(source, trusted=trusted)
    try:
        conversion = convert_official_state_dict(checkpoint)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error
    meta = dict(source=conversion.kind, arch=conversion.arch, backbone=conversion.backbone)
    write_checkpoint(dict(state_dict=conversion.state_dict, meta=meta), target)
    return conversion


def convert_official_state_dict(checkpoint: dict) -> Conversion:
    """Convert the authors' weights to ours.

    Args:
        checkpoint: Their checkpoint, ``{'model': state_dict, ...}``, or the state dict itself (or under the key
            'state_dict'). A prefix of the backbone's keys, as in a detector, is removed; other tensors are skipped.

    Raises:
        ValueError: It is not a Strip-MLP checkpoint, its arch is unknown, or tensors are missing, unexpected or of
            another shape.
    """
    weights = checkpoint
    for key in ('model', 'state_dict'):
        weights = weights.get(key, weights) if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise ValueError("not a checkpoint of the authors: it must be {'model': state_dict} or a state dict")
    official, skipped = _strip_prefix(weights)
    kind = 'MLP-DINO' if any('.proh_w.' in key for key in official) else 'classification'
    arch, backbone = _recognize_arch(official)
    expected = {f'backbone.{key}': tuple(value.shape) for key, value in StripMLP(**backbone).state_dict().items()}
    if kind == 'classification':
        classes = official['head.weight'].shape[0] if 'head.weight' in official else 1000
        channels = StripMLP.arch_zoo[arch]['embed_dims'] * 8
        expected.update({'head.fc.weight': (classes, channels), 'head.fc.bias': (classes,)})
    names = {_our_key(key): key for key in official}
    missing = [key for key in expected if key not in names]
    unexpected = [key for key in official if _our_key(key) not in expected or names[_our_key(key)] != key]
    problems = [(word, keys) for word, keys in (('missing', missing), ('unexpected', unexpected)) if keys]
    if problems:
        listed = '; '.join(f'{len(keys)} {word} keys ({_listed(keys)})' for word, keys in problems)
        raise ValueError(f'not a complete Strip-MLP checkpoint of the authors: {listed}')
    state_dict = {}
    for ours, shape in expected.items():
        key = names[ours]
        value = _to_our_layout(key, official[key], shape)
        if value.shape != shape:
            raise ValueError(
                f'{key} has shape {tuple(official[key].shape)}, which does not convert to the {shape} of arch {arch!r}'
            )
        state_dict[ours] = value.clone()
    return Conversion(kind, arch, backbone, state_dict, skipped)


def _strip_prefix(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    stems = [key for key in weights if re.search(r'(^|\.)patch_embed\.weight$', key)]
    if len(stems) != 1 or weights[stems[0]].dim() != 4:
        raise ValueError(
            'not a Strip-MLP checkpoint of the authors: it has no 4-D patch_embed.weight; '
            f'its first keys are {_listed(list(weights))}'
        )
    prefix = stems[0][: -len('patch_embed.weight')]
    official = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    return official, len(weights) - len(official)


def _recognize_arch(official: dict[str, Tensor]) -> tuple[str, dict]:
    """Name of the arch and the arguments that build it, deduced from tensor shapes."""
    in_channels, embed_dims = official['patch_embed.weight'].shape[1], official['patch_embed.weight'].shape[0]
    blocks = {match.groups() for match in (re.match(r'blocks(\d)\.(\d+)\.', key) for key in official) if match}
    depths = tuple(sum(stage == str(i + 1) for stage, _ in blocks) for i in range(4))
    zoo = {(settings['embed_dims'], settings['depths']): name for name, settings in StripMLP.arch_zoo.items()}
    arch = zoo.get((embed_dims, depths))
    if arch is None:
        archs = ', '.join(f'{name}: {dims} and {blocks}' for (dims, blocks), name in zoo.items())
        raise ValueError(f'it has {embed_dims} stage-1 channels and depths {depths}, which match no arch ({archs})')
    extents, patches = [], []
    for stage in range(1, 5):
        key = f'blocks{stage}.0.token_mixing.smlp_block.proj_h.weight'
        if key not in official:
            raise ValueError(f'not a complete Strip-MLP checkpoint of the authors: {key} is missing')
        rows, tokens = official[key].shape[:2]
        extents.append(tokens)
        patches.append(rows // tokens)
    return arch, dict(arch=arch, img_size=extents[0] * 4, in_channels=in_channels, num_patches=patches)


def _our_key(official: str) -> str:
    module, _, tensor = official.rpartition('.')
    inside = re.fullmatch(r'blocks(\d)\.(\d+)\.(.+)', module)
    if inside:
        stage, block, module = inside.groups()
        ours = f'backbone.stages.{int(stage) - 1}.{block}.{_BLOCK.get(module, module)}'
    else:
        ours = _REST.get(module, module)
    return f'{ours}.{"table" if tensor == "embeddings_table" else tensor}'


def _to_our_layout(key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert strip weights from grouped convolutions (G * L, L, 1, k) to (G, k, L, L); reshape biases and GRN."""
    if re.search(r'\.pro[jh]_[hw]\.weight$', key):
        groups, strip_width, tokens, _ = shape
        fits = value.shape == (groups * tokens, tokens, 1, strip_width)
        return value.view(groups, tokens, tokens, strip_width).permute(0, 3, 1, 2) if fits else value
    return value.reshape(shape) if value.numel() == torch.Size(shape).numel() else value


def _listed(keys: list[str]) -> str:
    return ', '.join(keys[:_SHOWN]) + (', ...' if len(keys) > _SHOWN else '') if keys else 'none'
