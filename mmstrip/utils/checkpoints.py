"""Checkpoint files, read without running code in them."""

import argparse
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version
from torch import Tensor, nn

from .files import write_file
from .plain_values import from_plain

_SAFETENSORS = '.safetensors'
_WRAPPERS = re.compile(r'\b(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.')


class UnsafeCheckpointError(ValueError):
    """A checkpoint that cannot be read without running code."""


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint atomically.

    Args:
        checkpoint: Nested dicts, lists and tuples of tensors, numbers and strings, see
            :func:`.plain_values.to_plain`.
        path: File to write; a ``.safetensors`` file gets the ``state_dict``, and ``meta`` as JSON.

    Raises:
        OSError: The file cannot be written; an older file of that name is intact.
        ImportError: A ``.safetensors`` file needs safetensors, which is not installed.
    """
    if Path(path).suffix == _SAFETENSORS:
        tensors = {key: value.contiguous() for key, value in checkpoint['state_dict'].items()}
        content = _safetensors().torch.save(tensors, {'meta': json.dumps(checkpoint.get('meta', {}))})
        write_file(path, lambda file: file.write(content))
    else:
        write_file(path, lambda file: torch.save(checkpoint, file))


def _safetensors():
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(
            '.safetensors files need safetensors, which is not installed: pip install safetensors'
        ) from error
    return safetensors


def read_checkpoint(path: str | Path, map_location: str | torch.device = 'cpu', trusted: bool = False) -> Any:
    """Read a checkpoint without running code in it, and verify its checksums.

    Files of ``torch.save`` have checksums; safetensors and files from before PyTorch 1.6 have none. Histories and
    NumPy arrays, found in the checkpoints of OpenMMLab's model zoos, are allowed beside plain values.

    Args:
        path: File to read; a ``.safetensors`` file gives ``{'state_dict': ..., 'meta': ...}``.
        map_location: Device of the tensors, see :func:`torch.load`. Defaults to 'cpu'.
        trusted: Let the file run code; only for files from sources you trust. Defaults to False.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file contains objects that need code to load.
        ValueError: The file is damaged or of another kind.
        ImportError: A ``.safetensors`` file needs safetensors, which is not installed.
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}')
    if path.suffix == _SAFETENSORS:
        return _read_safetensors(path)
    problem = _problem_of_archive(path, trusted)
    if problem:
        raise ValueError(f'{path} cannot be loaded: {problem}')
    _allow_data_classes()
    try:
        return from_plain(torch.load(path, map_location=map_location, weights_only=not trusted))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        objects = re.findall(r'GLOBAL (\S+)', str(error))
        if objects:
            raise UnsafeCheckpointError(
                f'{path} cannot be loaded safely (weights_only=True): it contains {objects[0]}, which could run code. '
                'If you trust its source, use --trust-checkpoints'
            ) from error
        raise ValueError(f'{path} cannot be loaded: it is damaged or not a PyTorch checkpoint') from error


def _problem_of_archive(path: Path, trusted: bool) -> str:
    """What is wrong with a zip file of torch.save; torch.load does not verify its checksums."""
    with path.open('rb') as file:
        if file.read(4) != b'PK\3\4':  # how PyTorch tells it from its older format
            return ''
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not trusted and any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return 'it is compressed, unlike files of torch.save, and could fill the memory'
            if not trusted and sum(entry.file_size for entry in entries) > path.stat().st_size:
                return 'its tensors are larger than the file'
            if any(entry.external_attr & 0x10 for entry in entries):  # PyTorch would read uninitialized memory
                return 'it is damaged (a tensor is marked as a folder)'
            # All are 0 after torch.serialization.set_crc32_options(False).
            damaged = any(entry.CRC for entry in entries) and archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # damaged lengths and names raise errors of all kinds
        return f'it is damaged or not a PyTorch checkpoint ({type(error).__name__})'
    return f'it is damaged (wrong checksum of {damaged})' if damaged else ''


def _read_safetensors(path: Path) -> dict:
    library = _safetensors()
    try:
        with library.safe_open(path, framework='pt') as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
            meta = (file.metadata() or {}).get('meta', '{}')
    except library.SafetensorError as error:
        raise ValueError(f'{path} is damaged or not a safetensors file: {error}') from error
    try:
        meta = json.loads(meta)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: 'meta' in its header must be a JSON object")
    return dict(state_dict=state_dict, meta=meta)


def _allow_data_classes() -> None:
    """Allow the pure data classes in the checkpoints of the model zoos."""
    core = np._core if hasattr(np, '_core') else np.core
    numbers = {type(np.dtype(kind)) for kind in ('uint8', 'int32', 'uint32', 'int64', 'float32', 'float64')}
    functions = [core.multiarray._reconstruct, core.multiarray.scalar]
    torch.serialization.add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, *functions, *numbers])
    if digit_version(torch.__version__) >= digit_version('2.6'):  # functions under other names
        torch.serialization.add_safe_globals([(_history_method, 'builtins.getattr')])


def _history_method(owner: type, name: str) -> Callable:
    """Stands in for getattr, with which histories refer to their methods."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL getattr of {owner}')
    return getattr(HistoryBuffer, name)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--trust-checkpoints``."""
    parser.add_argument(
        '--trust-checkpoints',
        action='store_true',
        help='let checkpoints run code when loaded; only for files from sources you trust',
    )


def load_plain_weights_only(trusted: bool = False) -> None:
    """Make mmengine and PyTorch load checkpoints in this process without running code in them.

    Args:
        trusted: Allow code instead. Defaults to False.
    """
    switches = ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
    os.environ.pop(switches[not trusted], None)
    os.environ[switches[trusted]] = '1'
    _allow_data_classes()

    def load_from_local(path: str, map_location):
        checkpoint = read_checkpoint(path, map_location, trusted)
        if not isinstance(checkpoint, dict):
            raise ValueError(f'{path} must contain a dict of weights, but contains a {type(checkpoint).__name__}')
        return _unwrap(checkpoint)

    def load_from_http(address: str, map_location):
        return load_from_local(_download(address), map_location)

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)


def _download(address: str) -> Path:
    """Download a file to PyTorch's cache unless it is there; the first process does it for all."""
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(address).path).name)
    for turn in range(2):
        if turn == min(get_rank(), 1) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(address, path, progress=get_rank() == 0)
            except OSError as error:
                raise OSError(f'cannot download {address}: {error}') from error
        barrier()
    return path


def _unwrap(checkpoint: dict) -> dict:
    """Put the weights of :func:`weights_in` where mmengine expects them."""
    weights = weights_in(checkpoint)
    if weights is checkpoint:
        return checkpoint
    return dict({} if _is_state_dict(checkpoint) else checkpoint, state_dict=weights)


def weights_in(checkpoint: object) -> dict:
    """The state dict under 'state_dict' or 'model', or the checkpoint itself, without the prefix of torch.compile."""
    parts = [checkpoint.get(key) for key in ('state_dict', 'model')] if isinstance(checkpoint, dict) else []
    weights = next(filter(_is_state_dict, [*parts, checkpoint]), {})
    compiled = re.compile(r'(module\.)?_orig_mod\.')
    if weights and all(map(compiled.match, weights)):
        return OrderedDict((compiled.sub('', key, count=1), value) for key, value in weights.items())
    return weights


def _is_state_dict(value) -> bool:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(part, Tensor) for part in value.values())


def match_keys(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a state dict to those of a model, which differ by prefixes of DDP, torch.compile and so on."""
    own = {_WRAPPERS.sub('', key): key for key in model.state_dict()}
    keys = set(own.values())
    pairs = ((key if key in keys else own.get(_WRAPPERS.sub('', key), key), part) for key, part in state_dict.items())
    named = OrderedDict(pairs)
    named._metadata = getattr(state_dict, '_metadata', OrderedDict())
    return named


def load_full_checkpoint(model: nn.Module, config: str, path: str, trusted: bool = False) -> dict:
    """Load a checkpoint that must contain all weights of a model.

    Args:
        model: Any module.
        config: Its config file, named in errors.
        path: Checkpoint.
        trusted: See :func:`read_checkpoint`.

    Returns:
        The checkpoint; its 'meta' is always a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read or does not fit the model.
    """
    checkpoint = read_checkpoint(path, trusted=trusted)
    problem = load_full_state_dict(model, weights_in(checkpoint))
    if problem:
        raise ValueError(f'{path} does not fit the model of {config}: it {problem}')
    meta = checkpoint.get('meta')
    return dict(checkpoint, meta=meta if isinstance(meta, dict) else {})


def load_full_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    """Load a state dict that must contain all weights of a model.

    Args:
        model: Any module.
        state_dict: Weights, with or without the prefixes of wrappers, see :func:`match_keys`.

    Returns:
        What is wrong, to follow 'it': tensors are missing or, after the model's hooks, of other shapes. '' if nothing.
    """
    weights = match_keys(model, state_dict)
    expected, misfits = list(model.state_dict()), ''
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # one line per tensor after the first line
        misfits = '; '.join(line.strip() for line in str(error).splitlines()[1:6])
        missing = [key for key in expected if key not in weights]
    if missing:
        return (
            f"lacks {len(missing)} of the model's {len(expected)} tensors, such as {', '.join(missing[:5])}; "
            f'its first keys are {", ".join(list(state_dict)[:5]) or "none"}'
        )
    return misfits and f'has tensors of other shapes: {misfits}'
