"""Finds the fastest way to compute something on the card at hand, by timing each way there once."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ...version import __version__

ROUNDS = 5
TOLERANCES = {torch.float32: 1e-2}  # relative errors in L2 norm; 0.1 for half precision
known: dict[str, str] = {}  # what was chosen in this process, or came with a checkpoint


def choose(
    operation: str,
    modules: Sequence[nn.Module],
    maps: Sequence[Tensor],
    ways: dict[str, Callable],
    run: Callable | None = None,
) -> str:
    """Return the name of the fastest way. Without a GPU, or with deterministic algorithms, it is the first one.

    The first way is the reference. Ways that were never timed on this card are timed; the result is kept in
    :data:`known` and in :func:`choices_file`. A way that fails, or whose results differ from the reference's, is never
    chosen.

    Args:
        operation: What the ways compute.
        modules: Copies of the network's modules: runs change their gradients and statistics.
        maps: Synthetic maps of the shapes and types to come, with ``requires_grad`` as in training.
        ways: Name -> function of the modules, then the maps, that returns a map or a tuple of maps.
        run: Returns the seconds and the results of a way. Defaults to :func:`run_on_card`.
    """
    reference = next(iter(ways))
    if torch.are_deterministic_algorithms_enabled() or (run is None and not maps[0].is_cuda):
        return reference
    key = _key(operation, maps)
    chosen = known.get(key) or _read().get(key)
    if chosen not in ways:
        chosen = _fastest(modules, maps, ways, run or run_on_card)
        _write({**_read(), key: chosen})
    known[key] = chosen
    return chosen


def _fastest(modules: Sequence[nn.Module], maps: Sequence[Tensor], ways: dict[str, Callable], run: Callable) -> str:
    fastest, least, expected = next(iter(ways)), math.inf, None
    for name, way in ways.items():
        try:
            seconds, results = run(way, modules, maps)
        except Exception as error:  # whatever a compiler or a card raises
            print_log(f'Strip-MLP: {name} cannot run on this card: {type(error).__name__}', 'current')
            continue
        expected = expected or results
        if len(results) != len(expected) or not all(map(_agree, results, expected)):
            print_log(f'Strip-MLP: {name} give other results on this card and are not used', 'current')
        elif seconds < least:
            fastest, least = name, seconds
    return fastest


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether values agree to rounding and are finite."""
    error = (found.float() - expected.float()).norm()
    return bool(error <= TOLERANCES.get(expected.dtype, 0.1) * expected.float().norm())


def run_on_card(way: Callable, modules: Sequence[nn.Module], maps: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The median seconds of a pass on a GPU, after two that compile, and the results of :func:`run_once`."""
    seconds = []
    for _ in range(2 + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        results = run_once(way, modules, maps)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return sorted(seconds[2:])[ROUNDS // 2], results


def run_once(way: Callable, modules: Sequence[nn.Module], maps: Sequence[Tensor]) -> list[Tensor]:
    """Run forward, and backward if gradients are required; return the results and the gradients.

    Gradients of all parameters form one vector, as single ones may be nothing but rounding errors.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.grad = None
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in maps]
    results = way(*modules, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    required = [y for y in results if y.requires_grad]
    if required:
        torch.autograd.backward(required, [y.detach() for y in required])
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    vector = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    return [*(y.detach() for y in results), *grads, *([torch.cat(vector)] if vector else [])]


def choices_file() -> Path:
    """The file of choices, next to PyTorch's compile cache."""
    folder = os.environ.get('TORCHINDUCTOR_CACHE_DIR') or Path(tempfile.gettempdir()) / f'torchinductor_{os.getuid()}'
    return Path(folder) / 'mmstrip_choices.json'


def _key(operation: str, maps: Sequence[Tensor]) -> str:
    device = maps[0].device
    card = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    pass_ = 'training' if torch.is_grad_enabled() else 'inference'
    kinds = ', '.join(f'{tuple(x.shape)} {x.dtype}' for x in maps)
    return ' | '.join([operation, pass_, kinds, card, torch.__version__, __version__])


def _read() -> dict[str, str]:
    try:
        kept = json.loads(choices_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(kept: dict[str, str]) -> None:
    """Write atomically. If the folder is not writable, the next process times again."""
    file = choices_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f'.{os.getpid()}')
        part.write_text(json.dumps(kept, indent=1, sort_keys=True))
        part.replace(file)
    except OSError:
        pass
