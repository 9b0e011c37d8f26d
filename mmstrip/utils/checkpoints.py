"""Checkpoint files, read without running any code in them."""

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
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
    """A checkpoint that cannot be read without running code in it."""


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint atomically.

    Args:
        checkpoint: Nested dicts, lists and tuples of tensors, numbers and strings, as
            :func:`.plain_values.to_plain` gives them.
        path: File to write; one that ends in ``.safetensors`` gets the ``state_dict``, and ``meta`` as JSON.

    Raises:
        OSError: It cannot be written; an older file of that name is still there.
        ImportError: A ``.safetensors`` file without the package of that name.
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


def read_checkpoint(path: str | Path, map_location='cpu', trusted: bool = False):
    """Read a checkpoint without running any code in it, and compare it with the checksums in it.

    Files of ``torch.save`` have checksums, those from before PyTorch 1.6 and safetensors have none. Histories and
    NumPy arrays, as in the checkpoints of OpenMMLab's model zoos, are allowed beside plain values.

    Args:
        path: File to read; of a ``.safetensors`` file the result is ``{'state_dict': ..., 'meta': ...}``.
        map_location: Where tensors go, as of :func:`torch.load`. Defaults to 'cpu'.
        trusted: Run what code the file asks for; only for files whose makers you trust. Defaults to False.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: It holds objects that need code to be run.
        ValueError: It is damaged or another kind of file.
        ImportError: A ``.safetensors`` file without the package of that name.
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
        start = f'{path} cannot be loaded as plain weights (weights_only=True): it'
        objects = re.findall(r'GLOBAL (\S+)', str(error))
        if objects:
            raise UnsafeCheckpointError(
                f'{start} holds {objects[0]}, which would run code; --trust-checkpoints loads what you trust'
            ) from error
        raise ValueError(f'{start} is damaged or another kind of file') from error


def _problem_of_archive(path: Path, trusted: bool) -> str:
    """What is wrong with the zip file that torch.save writes; torch.load does not look at its checksums."""
    with path.open('rb') as file:
        if file.read(4) != b'PK\3\4':  # PyTorch's own way to tell it from its older format
            return ''
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not trusted and any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return 'it is compressed, which torch.save never does, and may fill the memory'
            if not trusted and sum(entry.file_size for entry in entries) > path.stat().st_size:
                return 'its tensors are larger than the file'
            if any(entry.external_attr & 0x10 for entry in entries):  # PyTorch takes whatever is in the memory then
                return 'it is damaged, a tensor in it is marked as a folder'
            # All of them 0: torch.serialization.set_crc32_options(False).
            damaged = any(entry.CRC for entry in entries) and archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # damaged lengths and names end in errors of all kinds
        return f'it is damaged or another kind of file ({type(error).__name__})'
    return f'it is damaged, {damaged} in it does not fit its checksum' if damaged else ''


def _read_safetensors(path: Path) -> dict:
    """On the CPU, wherever the tensors go from there."""
    library = _safetensors()
    try:
        with library.safe_open(path, framework='pt') as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            meta = (file.metadata() or {}).get('meta', '{}')
    except library.SafetensorError as error:
        raise ValueError(f'{path} is damaged or no safetensors file: {error}') from error
    try:
        meta = json.loads(meta)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: 'meta' in its header must be an object of JSON")
    return dict(state_dict=state_dict, meta=meta)


def _allow_data_classes() -> None:
    """Classes that only hold data and that the checkpoints of the model zoos use."""
    core = np._core if hasattr(np, '_core') else np.core
    numbers = {type(np.dtype(kind)) for kind in ('uint8', 'int32', 'uint32', 'int64', 'float32', 'float64')}
    functions = [core.multiarray._reconstruct, core.multiarray.scalar]
    torch.serialization.add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, *functions, *numbers])
    if digit_version(torch.__version__) >= digit_version('2.6'):  # functions under another name
        torch.serialization.add_safe_globals([(_history_method, 'builtins.getattr')])


def _history_method(owner: type, name: str) -> Callable:
    """Stands in for getattr, by which histories name their own methods."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL getattr of {owner}')
    return getattr(HistoryBuffer, name)


def load_plain_weights_only(trusted: bool = False) -> None:
    """Let this process load checkpoints without running any code in them, wherever mmengine or PyTorch do it.

    Args:
        trusted: Run what code the files ask for, instead. Defaults to False.
    """
    switches = ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
    os.environ.pop(switches[not trusted], None)
    os.environ[switches[trusted]] = '1'
    _allow_data_classes()

    def load_from_local(path: str, map_location):
        checkpoint = read_checkpoint(path, map_location, trusted)
        if not isinstance(checkpoint, dict):
            raise ValueError(f'{path} must hold a dict of weights, but has a {type(checkpoint).__name__}')
        return _unwrap(checkpoint)

    def load_from_http(address: str, map_location):
        return load_from_local(_download(address), map_location)

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)


def _download(address: str) -> Path:
    """Download a file to where PyTorch keeps them, if it is not there yet; the first process does it for all."""
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
    """As mmengine expects it, with the weights of :func:`weights_in`."""
    weights = weights_in(checkpoint)
    if weights is checkpoint:
        return checkpoint
    return dict({} if _is_state_dict(checkpoint) else checkpoint, state_dict=weights)


def weights_in(checkpoint) -> dict:
    """The state dict under 'state_dict' or 'model', or the checkpoint itself; keys as before torch.compile."""
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


def name_as(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the keys of a model, where DDP, torch.compile and the like have put theirs into its names."""
    own = {_WRAPPERS.sub('', key): key for key in model.state_dict()}
    keys = set(own.values())
    pairs = ((key if key in keys else own.get(_WRAPPERS.sub('', key), key), part) for key, part in state_dict.items())
    named = OrderedDict(pairs)
    named._metadata = getattr(state_dict, '_metadata', OrderedDict())
    return named


def fill_model(model: nn.Module, config: str, path: str, trusted: bool = False) -> dict:
    """Load a checkpoint that must have all weights of a model.

    Args:
        model: Any.
        config: Its config file, for the error.
        path: Checkpoint.
        trusted: As of :func:`read_checkpoint`.

    Returns:
        The checkpoint, with a dict as its 'meta' in any case.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not fill the model, or cannot be read.
    """
    checkpoint = read_checkpoint(path, trusted=trusted)
    problem = load_whole(model, weights_in(checkpoint))
    if problem:
        raise ValueError(f'{path} does not fill the model of {config}: it {problem}')
    meta = checkpoint.get('meta')
    return dict(checkpoint, meta=meta if isinstance(meta, dict) else {})


def load_whole(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    """Load weights that must fill a model.

    Args:
        model: Any.
        state_dict: Its weights, whose names may be those of a wrapper, see :func:`name_as`.

    Returns:
        What is wrong, to come after 'it': tensors are missing or, after the model's own hooks, of other shapes. '' if
        nothing is.
    """
    weights = name_as(model, state_dict)
    expected, misfits = list(model.state_dict()), ''
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # a line for each, below the first
        misfits = '; '.join(line.strip() for line in str(error).splitlines()[1:6])
        missing = [key for key in expected if key not in weights]
    if missing:
        return (
            f"lacks {len(missing)} of the model's {len(expected)} tensors, first of all {', '.join(missing[:5])}; "
            f'its own first keys are {", ".join(list(state_dict)[:5])}'
        )
    return misfits and f'has tensors of other shapes: {misfits}'
