"""State dicts of the backbone: what a checkpoint holds, refusals of other archs, resampling to another ``img_size``."""

import logging
import os

import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from .arguments import BRANCHES, NUM_STAGES, STEM_STRIDE, parse_num_patches
from .strip_mixing import RelativePosition, StripMLPLayer


def adapt_state_dict(model: nn.Module, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Bring a state dict to a backbone's ``img_size``, in place; log if there was need to.

    Args:
        model: A :class:`.strip_mlp.StripMLP`.
        state_dict: Of the same arch.
        prefix: What stands before the backbone's own names, such as 'backbone.'. Defaults to ''.

    Raises:
        ValueError: The state dict is of another arch, or damaged.
    """
    _check_arch(model, state_dict, prefix)
    resampled = dict.fromkeys((StripMLPLayer, RelativePosition), 0)
    for name, module in model.named_modules():
        if isinstance(module, StripMLPLayer):
            resampled[StripMLPLayer] += resample_strips(module, state_dict, f'{prefix}{name}.')
        elif isinstance(module, RelativePosition):
            resampled[RelativePosition] += resample_table(module, state_dict, f'{prefix}{name}.')
    if any(resampled.values()):
        print_log(
            f'Resampled the weights of {resampled[StripMLPLayer]} strip MLP layers and '
            f'{resampled[RelativePosition]} position tables to img_size {model.img_size}: the checkpoint was '
            'trained at another one.',
            logger='current',
        )
    _check_shapes(model, state_dict, prefix)


def report_coverage(model: nn.Module, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Log how many of a backbone's tensors a state dict holds; warn if they are not all.

    Args:
        model: A :class:`.strip_mlp.StripMLP`.
        state_dict: What it is about to load.
        prefix: What stands before the backbone's own names, such as 'backbone.'. Defaults to ''.
    """
    expected = [prefix + name for name in model.state_dict() if not name.endswith('num_batches_tracked')]
    missing = [name for name in expected if name not in state_dict]
    text = f'StripMLP: {len(expected) - len(missing)} of {len(expected)} tensors are in the checkpoint'
    if not missing:
        return print_log(text, logger='current')
    print_log(f'{text}, which lacks {", ".join(missing[:3])}', 'current', logging.WARNING)


def require_pretrained(init_cfg: dict | list | None) -> None:
    """Look for the files of ``init_cfg`` before they are read.

    Raises:
        FileNotFoundError: One is missing; the error says where the authors' weights are.
    """
    for entry in init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]:
        path = str(entry.get('checkpoint', '')) if entry and entry.get('type') == 'Pretrained' else ''
        if path and '://' not in path and not os.path.isfile(os.path.expanduser(path)):
            raise FileNotFoundError(
                f"init_cfg: no checkpoint at {path}; docs/model_zoo.md says where the authors' weights are and how "
                'tools/model_converters/official_to_mmstrip.py converts them; init_cfg=None starts from random weights'
            )


def recognise_backbone(state_dict: dict[str, Tensor]) -> tuple[str, dict, dict]:
    """What builds the Strip-MLP whose trained weights are in a state dict, at most one.

    Returns:
        The prefix of its keys, such as 'backbone.'; its ``arch`` as a dict; and further arguments: the ``img_size``
        that its strip weights belong to, in pixels, ``strip_width`` and ``branches`` where they are not the defaults.
        Whether it is a cascade, weights do not tell.

    Raises:
        ValueError: There is none, or it has the deploy form.
    """
    last = 'stages.0.0.strip_mixing.branches.cgsmm.row.weight'
    prefixes = [key.removesuffix(last) for key in state_dict if key.endswith(last)]
    if len(prefixes) != 1 or f'{prefixes[0]}patch_embed.weight' not in state_dict:
        raise ValueError(f'it holds no Strip-MLP of this package, its first keys are {", ".join(list(state_dict)[:3])}')
    prefix = prefixes[0]
    if f'{prefix}stages.0.0.channel_mixing.grn.beta' not in state_dict:
        raise ValueError('it is the deploy form, which does not train; take the checkpoint that it was made from')
    blocks = _blocks(state_dict, prefix)
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(NUM_STAGES))
    arch = dict(embed_dims=state_dict[f'{prefix}patch_embed.weight'].shape[0], depths=depths)
    if 0 in depths:
        raise ValueError(f'it must have blocks in all {NUM_STAGES} stages, but has {depths}')
    patches = [state_dict[prefix + last.replace('0', str(i), 1)].shape[0] for i in range(NUM_STAGES)]
    branches = tuple(name for name in BRANCHES if any(f'.branches.{name}.' in key for key in state_dict))
    ratio = state_dict[f'{prefix}stages.0.0.channel_mixing.fc1.weight'].shape[0] / arch['embed_dims']
    try:
        usual = parse_num_patches(None, arch['embed_dims'], branches)
    except ValueError:  # there is none
        usual = None
    if patches != usual:
        arch['num_patches'] = tuple(patches)
    if ratio != 3:
        arch['mlp_ratio'] = ratio
    _, width, _, extent = state_dict[prefix + last].shape
    others = dict(img_size=extent * STEM_STRIDE)
    if width != 3:
        others['strip_width'] = width
    if branches != BRANCHES:
        others['branches'] = branches
    return prefix, arch, others


def _blocks(state_dict: dict[str, Tensor], prefix: str) -> set[tuple[str, ...]]:
    """Stage and number of each block, as written in the keys."""
    return {tuple(key[len(prefix) :].split('.')[1:3]) for key in state_dict if key.startswith(f'{prefix}stages.')}


def resample_strips(layer: StripMLPLayer, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Bring strip weights trained at another extent to this layer's, in place; True if there was need to.

    Weights are interpolated over both token axes and scaled by old / new tokens, so that their sums over a line
    stay what they were; biases are interpolated over their one axis.
    """
    weight, bias = state_dict.get(prefix + 'weight'), state_dict.get(prefix + 'bias')
    if weight is None or bias is None or weight.dim() != 4 or bias.dim() != 2:
        return False
    old, new = weight.shape[3], layer.weight.shape[3]
    square = weight.shape[2] == weight.shape[3] == bias.shape[1]
    if old == new or not square or weight.shape[:2] != layer.weight.shape[:2]:
        return False
    planes = F.interpolate(weight.float(), (new, new), mode='bicubic', antialias=True) * (old / new)
    state_dict[prefix + 'weight'] = planes.to(weight.dtype)
    lines = F.interpolate(bias.float()[None, :, None], (1, new), mode='bicubic', antialias=True)
    state_dict[prefix + 'bias'] = lines[0, :, 0].contiguous().to(bias.dtype)
    return True


def resample_table(position: RelativePosition, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Bring a table trained at another extent to this one's span, in place; True if there was need to.

    Rows are interpolated linearly, offset 0 and both ends staying where they are.
    """
    table = state_dict.get(prefix + 'table')
    rows, channels = position.table.shape
    if table is None or table.dim() != 2 or table.shape[0] == rows or table.shape[1] != channels:
        return False
    resampled = F.interpolate(table.float().t()[None], rows, mode='linear', align_corners=True)
    state_dict[prefix + 'table'] = resampled[0].t().contiguous().to(table.dtype)
    return True


def _check_arch(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Compare what a state dict says of its arch with this model; silent on what it does not say."""
    stem = state_dict.get(f'{prefix}patch_embed.weight')
    if not prefix and state_dict and not set(state_dict) & set(model.state_dict()):
        raise ValueError(
            f'the checkpoint holds nothing of this StripMLP, its first keys are {", ".join(list(state_dict)[:5])}; '
            "that of a whole model needs prefix='backbone.', that of the authors the converter"
        )
    if stem is None or stem.dim() != 4:
        return
    found = dict(in_channels=stem.shape[1], embed_dims=stem.shape[0])
    expected = dict(in_channels=model.in_channels, embed_dims=model.embed_dims)
    blocks = _blocks(state_dict, prefix)
    if blocks:
        trained = any(key.startswith(f'{prefix}stages.') and key.endswith('.grn.beta') for key in state_dict)
        found['deploy'], expected['deploy'] = not trained, model.deploy
    for i, stage in enumerate(model.stages):
        found[f'depths[{i}]'], expected[f'depths[{i}]'] = sum(index == str(i) for index, _ in blocks), len(stage)
    for name, module in model.named_modules():
        weight = state_dict.get(f'{prefix}{name}.weight')
        if isinstance(module, StripMLPLayer) and weight is not None and weight.dim() == 4:
            key = f'num_patches[{name.split(".")[1]}]'
            found[key], expected[key] = weight.shape[0], module.weight.shape[0]
            found['strip_width'], expected['strip_width'] = weight.shape[1], module.weight.shape[1]
    different = [key for key in found if found[key] != expected[key]]
    if different == ['in_channels']:
        raise ValueError(
            f'the checkpoint has in_channels={found["in_channels"]} where the model has '
            f'in_channels={expected["in_channels"]}: docs/model_zoo.md, "Other channels", converts it'
        )
    if different:
        raise ValueError(
            'the checkpoint is of another arch than this StripMLP: it has '
            + ', '.join(f'{key}={found[key]}' for key in different)
            + ' where the model has '
            + ', '.join(f'{key}={expected[key]}' for key in different)
            + ', so build the model with the arch, num_patches, strip_width and deploy of the checkpoint'
        )


def _check_shapes(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Refuse what only mlp_ratio, branches or damage can explain, which loaders that are not strict pass over."""
    for key, value in model.state_dict().items():
        found = state_dict.get(prefix + key, value)
        if found.shape != value.shape:
            raise ValueError(
                f'the checkpoint is of another arch than this StripMLP: {key} has shape {tuple(found.shape)} '
                f'where the model has {tuple(value.shape)}'
            )
