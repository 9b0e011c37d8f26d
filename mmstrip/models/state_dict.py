"""State dicts of the backbone: checks against the model, resampling to another ``img_size``, and the arch they hold."""

import logging
import os

import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from .arguments import BRANCHES, NUM_STAGES, STEM_STRIDE, parse_num_patches
from .strip_mixing import RelativePosition, StripMLPLayer


def adapt_state_dict(model: nn.Module, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Resample a state dict to the ``img_size`` of a StripMLP, in place; log it if anything was resampled.

    ``prefix`` is that of the backbone's keys, such as 'backbone.'.

    Raises:
        ValueError: The state dict has another arch or is damaged.
    """
    _check_tensors(model, state_dict, prefix)
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
            f'{resampled[RelativePosition]} position tables to img_size {model.img_size}; '
            'the checkpoint was trained at another one.',
            logger='current',
        )
    _check_shapes(model, state_dict, prefix)


def report_coverage(model: nn.Module, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Log how many of a backbone's tensors a state dict holds; warn unless it holds all."""
    expected = [prefix + name for name in model.state_dict() if not name.endswith('num_batches_tracked')]
    missing = [name for name in expected if name not in state_dict]
    text = f'StripMLP: the checkpoint has {len(expected) - len(missing)} of {len(expected)} tensors'
    if not missing:
        return print_log(text, logger='current')
    print_log(f'{text}; missing are {", ".join(missing[:3])}{", ..." * (len(missing) > 3)}', 'current', logging.WARNING)


def require_pretrained(init_cfg: dict | list | None) -> None:
    """Check that the checkpoints that ``init_cfg`` names exist.

    Raises:
        FileNotFoundError: One is missing.
    """
    for entry in init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]:
        path = str(entry.get('checkpoint', '')) if entry and entry.get('type') == 'Pretrained' else ''
        if path and '://' not in path and not os.path.isfile(os.path.expanduser(path)):
            raise FileNotFoundError(
                f"init_cfg: no checkpoint at {path}. docs/model_zoo.md describes how to get the authors' weights; "
                'init_cfg=None starts from random weights'
            )


def recognize_backbone(state_dict: dict[str, Tensor]) -> tuple[str, dict, dict]:
    """Read the arguments of a Strip-MLP from its weights.

    Returns:
        The prefix of its keys, such as 'backbone.'; its ``arch`` as a dict; and further arguments: the ``img_size``
        of its strip weights, in pixels, and ``strip_width`` and ``branches`` unless they are the defaults. The weights
        do not tell whether ``cascade`` is set.

    Raises:
        ValueError: The state dict does not hold exactly one Strip-MLP, or holds the deploy form.
    """
    last = 'stages.0.0.strip_mixing.branches.cgsmm.row.weight'
    prefixes = [key.removesuffix(last) for key in state_dict if key.endswith(last)]
    if len(prefixes) != 1 or f'{prefixes[0]}patch_embed.weight' not in state_dict:
        first = ', '.join(map(str, list(state_dict)[:3])) or 'none'
        raise ValueError(f'it must hold one Strip-MLP of this package, but holds {len(prefixes)}; first keys: {first}')
    prefix = prefixes[0]
    if f'{prefix}stages.0.0.channel_mixing.grn.beta' not in state_dict:
        raise ValueError('it has the deploy form, which cannot be trained; use the checkpoint that it was made from')
    blocks = _blocks(state_dict, prefix)
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(NUM_STAGES))
    arch = dict(embed_dims=state_dict[f'{prefix}patch_embed.weight'].shape[0], depths=depths)
    if 0 in depths:
        raise ValueError(f'it must have blocks in all {NUM_STAGES} stages, but their numbers are {depths}')
    patches = [state_dict[prefix + last.replace('0', str(i), 1)].shape[0] for i in range(NUM_STAGES)]
    branches = tuple(name for name in BRANCHES if any(f'.branches.{name}.' in key for key in state_dict))
    ratio = state_dict[f'{prefix}stages.0.0.channel_mixing.fc1.weight'].shape[0] / arch['embed_dims']
    try:
        usual = parse_num_patches(None, arch['embed_dims'], branches)
    except ValueError:  # the authors' rule does not apply
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
    """Stage and index of each block, as in the keys."""
    return {tuple(key[len(prefix) :].split('.')[1:3]) for key in state_dict if key.startswith(f'{prefix}stages.')}


def resample_strips(layer: StripMLPLayer, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Resample strip weights trained at another extent to this layer's, in place; return whether that was needed.

    Weights are interpolated over both token axes and scaled by old / new tokens, which preserves their sums over a
    line. Biases are interpolated over their token axis.
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
    """Resample a position table trained at another extent to this one's span, in place; return whether that was needed.

    Rows are interpolated linearly; offset 0 and both ends stay in place.
    """
    table = state_dict.get(prefix + 'table')
    rows, channels = position.table.shape
    if table is None or table.dim() != 2 or table.shape[0] == rows or table.shape[1] != channels:
        return False
    resampled = F.interpolate(table.float().t()[None], rows, mode='linear', align_corners=True)
    state_dict[prefix + 'table'] = resampled[0].t().contiguous().to(table.dtype)
    return True


def _check_tensors(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    for key in (prefix + name for name in model.state_dict()):
        if key in state_dict and not isinstance(state_dict[key], Tensor):
            kind = type(state_dict[key]).__name__
            raise ValueError(f'the checkpoint is damaged: {key} must be a tensor, but is of type {kind}')


def _check_arch(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Compare the arch of a state dict with the model's, as far as its keys show it."""
    stem = state_dict.get(f'{prefix}patch_embed.weight')
    if not prefix and state_dict and not set(state_dict) & set(model.state_dict()):
        raise ValueError(
            f'the checkpoint holds nothing of this StripMLP; its first keys are {", ".join(list(state_dict)[:5])}. '
            "Load that of a whole model with prefix='backbone.', and convert that of the authors with "
            'tools/model_converters/official_to_mmstrip.py'
        )
    if stem is None or stem.dim() != 4:
        return
    pairs = dict(in_channels=(stem.shape[1], model.in_channels), embed_dims=(stem.shape[0], model.embed_dims))
    blocks = _blocks(state_dict, prefix)
    if blocks:
        trained = any(key.startswith(f'{prefix}stages.') and key.endswith('.grn.beta') for key in state_dict)
        pairs['deploy'] = not trained, model.deploy
    for i, stage in enumerate(model.stages):
        pairs[f'depths[{i}]'] = sum(index == str(i) for index, _ in blocks), len(stage)
    for name, module in model.named_modules():
        weight = state_dict.get(f'{prefix}{name}.weight')
        if isinstance(module, StripMLPLayer) and weight is not None and weight.dim() == 4:
            pairs[f'num_patches[{name.split(".")[1]}]'] = weight.shape[0], module.weight.shape[0]
            pairs['strip_width'] = weight.shape[1], module.weight.shape[1]
    different = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if not different:
        return
    found, expected = (', '.join(f'{key}={pair[side]}' for key, pair in different.items()) for side in (0, 1))
    if list(different) == ['in_channels']:
        raise ValueError(
            f'the checkpoint has {found}, but the model has {expected}; docs/model_zoo.md ("Other channels") shows how '
            'to convert it'
        )
    raise ValueError(
        f'the checkpoint does not fit this StripMLP: it has {found}, but the model has {expected}. Build the model '
        'with the values of the checkpoint'
    )


def _check_shapes(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Refuse other shapes (from another ``mlp_ratio`` or ``branches``), which non-strict loaders would skip."""
    for key, value in model.state_dict().items():
        found = state_dict.get(prefix + key, value)
        if found.shape != value.shape:
            raise ValueError(
                f'the checkpoint does not fit this StripMLP: its {key} has shape {tuple(found.shape)}, but that of the '
                f'model has {tuple(value.shape)}. Build the model with the mlp_ratio and branches of the checkpoint'
            )
