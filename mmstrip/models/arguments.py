"""Checks of the backbone's arguments and input: each error names what it got and what is allowed."""

from collections.abc import Sequence
from numbers import Integral, Real

from mmengine.utils import to_2tuple
from torch import Tensor

from .strip_mixing import BRANCHES

STEM_STRIDE = 4
NUM_STAGES = 4
# The smallest side that leaves one token in the last stage.
MIN_SIDE = STEM_STRIDE * 2 ** (NUM_STAGES - 1)


def check(valid: bool, name: str, got, allowed: str) -> None:
    if not valid:
        raise ValueError(f'{name} must be {allowed}, but got {got!r}')


def is_int(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_positive_int(value) -> bool:
    return is_int(value) and value > 0


def check_scalars(
    in_channels: int,
    strip_width: int,
    embed_dims: int,
    mlp_ratio: float,
    drop_path_rate: float,
    frozen_stages: int,
    ignore_padding: bool,
) -> None:
    check(is_positive_int(in_channels), 'in_channels', in_channels, 'a positive int')
    odd = is_positive_int(strip_width) and strip_width % 2 == 1
    check(odd, 'strip_width', strip_width, 'an odd positive int')
    wide = isinstance(mlp_ratio, Real) and embed_dims * mlp_ratio >= 1
    check(wide, 'mlp_ratio', mlp_ratio, 'a number that leaves at least one hidden channel')
    probable = isinstance(drop_path_rate, Real) and 0 <= drop_path_rate < 1
    check(probable, 'drop_path_rate', drop_path_rate, 'a number in [0, 1)')
    freezable = is_int(frozen_stages) and -1 <= frozen_stages <= NUM_STAGES
    check(freezable, 'frozen_stages', frozen_stages, f'an int from -1 to {NUM_STAGES}')
    check(isinstance(ignore_padding, bool), 'ignore_padding', ignore_padding, 'True or False')


def check_images(x: Tensor, in_channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_channels or min(x.shape[2:]) < MIN_SIDE:
        raise ValueError(
            f'StripMLP takes images of shape (N, {in_channels}, H, W) with H and W at least {MIN_SIDE}, '
            f'but got {tuple(x.shape)}'
        )


def parse_arch(arch: str | dict, zoo: dict[str, dict]) -> dict:
    if isinstance(arch, str):
        check(arch in zoo, 'arch', arch, f'one of {", ".join(zoo)}, or a dict')
        return zoo[arch]
    required, optional = {'embed_dims', 'depths'}, {'num_patches', 'mlp_ratio'}
    known = isinstance(arch, dict) and required <= set(arch) <= required | optional
    check(known, 'arch', arch, f'a name or a dict with {sorted(required)} and, optionally, {sorted(optional)}')
    embed_dims, depths = arch['embed_dims'], arch['depths']
    four = isinstance(depths, Sequence) and len(depths) == NUM_STAGES and all(map(is_positive_int, depths))
    check(four, 'depths', depths, f'{NUM_STAGES} positive ints')
    check(is_positive_int(embed_dims), 'embed_dims', embed_dims, 'a positive int')
    return arch


def parse_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = to_2tuple(img_size)
    valid = len(sides) == 2 and all(is_positive_int(side) and side % MIN_SIDE == 0 for side in sides)
    check(valid, 'img_size', img_size, f'one side or (H, W) in pixels, multiples of {MIN_SIDE} from {MIN_SIDE} up')
    return tuple(int(side) for side in sides)


def parse_out_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    valid = len(indices) > 0 and all(is_int(i) and -NUM_STAGES <= i < NUM_STAGES for i in indices)
    check(valid, 'out_indices', out_indices, f'one or more ints from {-NUM_STAGES} to {NUM_STAGES - 1}')
    return tuple(i % NUM_STAGES for i in indices)


def parse_branches(branches: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(branches) if isinstance(branches, Sequence) and not isinstance(branches, str) else (branches,)
    valid = len(names) > 0 and len(set(names)) == len(names) and set(names) <= set(BRANCHES)
    check(valid, 'branches', branches, f'one or both of {", ".join(BRANCHES)}')
    return names


def parse_num_patches(num_patches: int | Sequence[int] | None, embed_dims: int, branches: Sequence[str]) -> list[int]:
    """Channel patches of each stage; the authors' rule stands in for None."""
    per_stage = list(num_patches) if isinstance(num_patches, Sequence) else [num_patches] * NUM_STAGES
    check(len(per_stage) == NUM_STAGES, 'num_patches', num_patches, f'an int or {NUM_STAGES} ints')
    halves = embed_dims % len(branches) == 0 and embed_dims // len(branches) >= 2
    check(halves, 'embed_dims', embed_dims, 'even and at least 4, to be halved between CGSMM and LSMM')
    if 'cgsmm' not in branches:
        return per_stage
    for i, count in enumerate(per_stage):
        channels = embed_dims * 2**i // len(branches)
        if count is None:
            size = 2 if embed_dims * 2**i % 80 == 0 else 4
            splits = f"such that CGSMM's {channels} channels of stage {i} split into patches of {size}"
            check(channels % size == 0, 'embed_dims', embed_dims, f'{splits}, or come with num_patches')
            per_stage[i] = channels // size
        else:
            valid = is_positive_int(count) and channels % count == 0
            allowed = f'divisors of the channels that CGSMM gets ({channels} in stage {i})'
            check(valid, 'num_patches', num_patches, allowed)
    return per_stage
