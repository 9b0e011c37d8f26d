"""Checks of the backbone's arguments and input."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

from mmengine.utils import to_2tuple
from torch import Tensor

from .strip_mixing import BRANCHES

STEM_STRIDE = 4
NUM_STAGES = 4
# The smallest side that leaves one token in the last stage.
MIN_SIDE = STEM_STRIDE * 2 ** (NUM_STAGES - 1)


def check(valid: bool, name: str, got: object, allowed: str) -> None:
    if not valid:
        raise ValueError(f'{name} must be {allowed}, but got {got!r}')


def is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_positive_int(value: object) -> bool:
    return is_int(value) and value > 0


def check_scalars(
    in_channels: int,
    strip_width: int,
    embed_dims: int,
    mlp_ratio: float,
    drop_path_rate: float,
    frozen_stages: int,
    **flags: bool,
) -> None:
    check(is_positive_int(in_channels), 'in_channels', in_channels, 'a positive int')
    odd = is_positive_int(strip_width) and strip_width % 2 == 1
    check(odd, 'strip_width', strip_width, 'an odd positive int')
    wide = isinstance(mlp_ratio, Real) and math.isfinite(mlp_ratio) and embed_dims * mlp_ratio >= 1
    check(wide, 'mlp_ratio', mlp_ratio, 'a finite number that gives at least one hidden channel')
    probable = isinstance(drop_path_rate, Real) and 0 <= drop_path_rate < 1
    check(probable, 'drop_path_rate', drop_path_rate, 'a number in [0, 1)')
    freezable = is_int(frozen_stages) and -1 <= frozen_stages <= NUM_STAGES
    check(freezable, 'frozen_stages', frozen_stages, f'an int from -1 to {NUM_STAGES}')
    for name, value in flags.items():
        check(isinstance(value, bool), name, value, 'True or False')


def check_layers(**cfgs: dict) -> None:
    for name, cfg in cfgs.items():
        check(isinstance(cfg, dict) and 'type' in cfg, name, cfg, 'a dict with a type')


def check_images(x: Tensor, in_channels: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f'StripMLP takes a tensor of images, but got {type(x).__name__}')
    if x.dim() != 4 or x.shape[1] != in_channels or min(x.shape[2:]) < MIN_SIDE:
        raise ValueError(
            f'StripMLP takes images of shape (N, {in_channels}, H, W) with H and W at least {MIN_SIDE}, '
            f'but got {tuple(map(int, x.shape))}'
        )


def parse_arch(arch: str | dict, zoo: dict[str, dict]) -> dict:
    if isinstance(arch, str):
        check(arch in zoo, 'arch', arch, f'one of {", ".join(zoo)}, or a dict')
        return zoo[arch]
    required, optional = {'embed_dims', 'depths'}, {'num_patches', 'mlp_ratio'}
    known = isinstance(arch, dict) and required <= set(arch) <= required | optional
    keys = [' and '.join(sorted(names)) for names in (required, optional)]
    check(known, 'arch', arch, f'a name or a dict with {keys[0]} and, optionally, {keys[1]}')
    embed_dims, depths = arch['embed_dims'], arch['depths']
    four = isinstance(depths, Sequence) and len(depths) == NUM_STAGES and all(map(is_positive_int, depths))
    check(four, 'depths', depths, f'{NUM_STAGES} positive ints')
    check(is_positive_int(embed_dims), 'embed_dims', embed_dims, 'a positive int')
    return arch


def parse_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = to_2tuple(img_size)
    valid = len(sides) == 2 and all(is_positive_int(side) and side % MIN_SIDE == 0 for side in sides)
    check(valid, 'img_size', img_size, f'one side or (H, W) in pixels, positive multiples of {MIN_SIDE}')
    return tuple(int(side) for side in sides)


def parse_out_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    valid = len(indices) > 0 and all(is_int(i) and -NUM_STAGES <= i < NUM_STAGES for i in indices)
    check(valid, 'out_indices', out_indices, f'one or more ints from {-NUM_STAGES} to {NUM_STAGES - 1}')
    return tuple(i % NUM_STAGES for i in indices)


def parse_branches(branches: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(branches) if isinstance(branches, Sequence) and not isinstance(branches, str) else (branches,)
    valid = len(names) > 0 and all(name in BRANCHES and names.count(name) == 1 for name in names)
    check(valid, 'branches', branches, f'one or both of {", ".join(BRANCHES)}')
    return names


def parse_num_patches(num_patches: int | Sequence[int] | None, embed_dims: int, branches: Sequence[str]) -> list[int]:
    """Channel patches of each stage; None stands for the authors' rule."""
    per_stage = list(num_patches) if isinstance(num_patches, Sequence) else [num_patches] * NUM_STAGES
    check(len(per_stage) == NUM_STAGES, 'num_patches', num_patches, f'an int or {NUM_STAGES} ints')
    enough = embed_dims % len(branches) == 0 and embed_dims // len(branches) >= 2
    allowed = 'at least 2' if len(branches) == 1 else 'even and at least 4, as CGSMM and LSMM get one half each'
    check(enough, 'embed_dims', embed_dims, allowed)
    if 'cgsmm' not in branches:
        return per_stage
    for i, count in enumerate(per_stage):
        channels = embed_dims * 2**i // len(branches)
        if count is None:
            size = 2 if embed_dims * 2**i % 80 == 0 else 4
            allowed = f'such that CGSMM gets a multiple of {size} channels, not {channels}, in stage {i}'
            check(channels % size == 0, 'embed_dims', embed_dims, f'{allowed}, unless num_patches is given')
            per_stage[i] = channels // size
        else:
            valid = is_positive_int(count) and channels % count == 0
            check(valid, 'num_patches', num_patches, f'a divisor of the {channels} channels of CGSMM in stage {i}')
    return per_stage
