"""Which way to compute a block is the fastest on the card at hand: timed there, once, never guessed."""

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ...version import __version__

ROUNDS = 5
TOLERANCES = {torch.float32: 1e-2}  # relative errors, in L2 norm; 0.1 of half precision
known: dict[str, str] = {}  # what was chosen in this process, or came with a checkpoint


def choose(operation: str, block: nn.Module, x: Tensor, ways: dict[str, Callable], run: Callable | None = None) -> str:
    """The name of the fastest way; the first one, the reference, without a GPU or with deterministic algorithms.

    What was never timed on this card is timed, and kept in :data:`known` and in :func:`choices_file`. A way that fails,
    or whose results are not the reference's, is never chosen.

    Args:
        operation: What the ways compute.
        block: A copy, which keeps what runs leave behind: gradients, statistics.
        x: A synthetic map, of the shape and type to come.
        ways: Functions of the block and a map, by name.
        run: Gives the seconds and the results of a way. Defaults to :func:`run_on_card`.
    """
    reference = next(iter(ways))
    if torch.are_deterministic_algorithms_enabled() or (run is None and not x.is_cuda):
        return reference
    key = _key(operation, x)
    chosen = known.get(key) or _read().get(key)
    if chosen not in ways:
        chosen = _fastest(block, x, ways, run or run_on_card)
        _write({**_read(), key: chosen})
    known[key] = chosen
    return chosen


def _fastest(block: nn.Module, x: Tensor, ways: dict[str, Callable], run: Callable) -> str:
    fastest, least, expected = next(iter(ways)), math.inf, None
    for name, way in ways.items():
        try:
            seconds, results = run(way, block, x)
        except Exception as error:  # whatever a compiler or a card raises
            print_log(f'Strip-MLP: {name} cannot run on this card: {type(error).__name__}', 'current')
            continue
        expected = expected or results
        if not all(map(_agree, results, expected)):
            print_log(f'Strip-MLP: {name} give other results on this card and are not used', 'current')
        elif seconds < least:
            fastest, least = name, seconds
    return fastest


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether values are the same to rounding; all are finite then."""
    error = (found.float() - expected.float()).norm()
    return bool(error <= TOLERANCES.get(expected.dtype, 0.1) * expected.float().norm())


def run_on_card(way: Callable, block: nn.Module, x: Tensor) -> tuple[float, list[Tensor]]:
    """Median seconds on a GPU of some passes after two that compile, and results: the map and, in training, gradients.

    Gradients of all parameters are one vector, as single ones may be nothing but rounding.
    """
    seconds, training = [], torch.is_grad_enabled()
    for _ in range(2 + ROUNDS):
        block.zero_grad()
        leaf = x.detach().requires_grad_(training)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y = way(block, leaf)
        if training:
            y.backward(x.to(y.dtype))
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    results = [y.detach()]
    if training:
        results += [leaf.grad, torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])]
    return sorted(seconds[2:])[ROUNDS // 2], results


def choices_file() -> Path:
    """Beside PyTorch's compile cache."""
    folder = os.environ.get('TORCHINDUCTOR_CACHE_DIR') or Path(tempfile.gettempdir()) / f'torchinductor_{os.getuid()}'
    return Path(folder) / 'mmstrip_choices.json'


def _key(operation: str, x: Tensor) -> str:
    card = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
    pass_ = 'training' if torch.is_grad_enabled() else 'inference'
    return ' | '.join([operation, pass_, f'{tuple(x.shape)} {x.dtype}', card, torch.__version__, __version__])


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
