"""Which of several ways to compute something is the fastest on the card at hand: timed there, once, never guessed."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ...version import __version__

ROUNDS = 5


def choose(
    operation: str,
    inputs: list[Tensor],
    ways: dict[str, Callable],
    time: Callable[[Callable, list[Tensor]], float] | None = None,
    group=None,
) -> str:
    """The name of the fastest way; the first one, the reference, without a GPU or with deterministic algorithms.

    What was never timed on this card is timed by the first process, which tells the others, and kept in
    :func:`choices_file`, so that a resumed training computes the same.

    Args:
        operation: What the ways compute.
        inputs: Synthetic ones, of the shapes and types to come.
        ways: Functions of the inputs, by name. One that fails is not chosen; the reference must not.
        time: Takes a function and its inputs, gives seconds. Defaults to :func:`time_on_card`, forward and backward.
        group: Of processes that choose together. Defaults to all.
    """
    reference = next(iter(ways))
    if torch.are_deterministic_algorithms_enabled() or (time is None and not inputs[0].is_cuda):
        return reference
    key = _key(operation, inputs)
    chosen = [None]
    if not dist.is_initialized() or dist.get_rank(group) == 0:
        chosen = [_read().get(key)]
        if chosen[0] not in ways:
            seconds = {name: _time(time or time_on_card, way, inputs, name != reference) for name, way in ways.items()}
            chosen = [min(seconds, key=seconds.get)]
            _write({**_read(), key: chosen[0]})
    if dist.is_initialized():
        source = dist.get_global_rank(group, 0) if group is not None else 0
        dist.broadcast_object_list(chosen, src=source, group=group)
    return chosen[0]


def time_on_card(way: Callable, inputs: list[Tensor]) -> float:
    """Seconds of a forward and backward pass on the inputs' GPU: the median of some, after two that compile."""
    seconds = []
    for _ in range(2 + ROUNDS):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y = way(*leaves)
        y.backward(torch.ones_like(y))
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return sorted(seconds[2:])[ROUNDS // 2]


def choices_file() -> Path:
    """Beside PyTorch's compile cache."""
    folder = os.environ.get('TORCHINDUCTOR_CACHE_DIR') or Path(tempfile.gettempdir()) / f'torchinductor_{os.getuid()}'
    return Path(folder) / 'mmstrip_choices.json'


def _key(operation: str, inputs: list[Tensor]) -> str:
    device = inputs[0].device
    card = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    shapes = [f'{tuple(x.shape)} {tuple(x.stride())} {x.dtype}' for x in inputs]
    return ' | '.join([operation, *shapes, card, torch.__version__, __version__])


def _time(time: Callable, way: Callable, inputs: list[Tensor], may_fail: bool) -> float:
    try:
        return time(way, inputs)
    except Exception:  # whatever a compiler or a card raises
        if may_fail:
            return float('inf')
        raise


def _read() -> dict[str, str]:
    try:
        kept = json.loads(choices_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(kept: dict[str, str]) -> None:
    """At once or not at all; where the folder is not ours to write, choices are made again."""
    file = choices_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f'.{os.getpid()}')
        part.write_text(json.dumps(kept, indent=1, sort_keys=True))
        part.replace(file)
    except OSError:
        pass
