"""Checkpoint files: written atomically, of plain values only, and read without running any code in them."""

import json
import logging
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version
from torch import Tensor, nn

CHECKPOINTS = ('epoch_*.pth', 'iter_*.pth', 'interrupted.pth')
_PLAIN = (str, bytes, int, float, bool, type(None))
_SAFETENSORS = '.safetensors'
_HISTORY = {'history', 'counts', 'max_length'}


class UnsafeCheckpointError(ValueError):
    """A checkpoint that cannot be read without running code in it."""


def write_file(path: str | Path, write: Callable) -> None:
    """Write a file atomically: to a temporary file beside it, flushed to the disk, then renamed.

    Args:
        path: The file; an older one stays as it is until the new one is complete.
        write: Called with the open binary file.

    Raises:
        OSError: It cannot be written, because the disk is full for instance; the older file is still there.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp', delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = _write_error(error)
        if reason is None:
            raise
        raise OSError(
            reason.errno, f'cannot write {path}: {reason.strerror or reason}; nothing else is lost'
        ) from error


def _write_error(error: BaseException) -> OSError | None:
    """The error of the file system behind an error; torch.save reports its own, at closing its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _flush_folder(folder: Path) -> None:
    """Make the renaming itself last, where the system has that."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what processes that were killed while they wrote have left in a folder."""
    for file in Path(folder).glob('.*.tmp'):
        file.unlink(missing_ok=True)


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint atomically.

    Args:
        checkpoint: Nested dicts, lists and tuples of tensors, numbers and strings, as :func:`to_plain` gives them.
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


class _LeftOut:
    """Stands for a value that is no plain one."""


def to_plain(checkpoint: dict) -> dict:
    """A checkpoint of values that can be loaded without running code; :func:`restore_histories` undoes it.

    Histories become dicts of tensors and NumPy values become tensors and numbers. Other objects, such as the functions
    among the attributes of a scheduler, are left out, which is logged.
    """
    left_out: list[str] = []
    content = _plain(checkpoint, '', left_out)
    if left_out:
        print_log(f'Not in the checkpoint, as no plain values: {", ".join(left_out)}', 'current', logging.DEBUG)
    return content


def _plain(value, name: str, left_out: list[str]):
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, HistoryBuffer):
        history, counts = (torch.from_numpy(np.array(part, dtype=float)) for part in value.data)
        return dict(history=history, counts=counts, max_length=value.max_length)
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        if value and all(isinstance(part, Tensor) for part in value.values()):
            return value  # a state dict, with its _metadata
        parts = {key: _plain(part, f'{name}.{key}'.strip('.'), left_out) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not _LeftOut}
    if isinstance(value, (list, tuple, set)):
        parts = [_plain(part, f'{name}.{i}', left_out) for i, part in enumerate(value)]
        parts = [part for part in parts if part is not _LeftOut]
        return tuple(parts) if isinstance(value, tuple) else parts
    if type(value) in _PLAIN:
        return value
    left_out.append(name)
    return _LeftOut


def restore_histories(value):
    """Histories again where :func:`to_plain` made dicts of them, in nested dicts."""
    if not isinstance(value, dict):
        return value
    if set(value) == _HISTORY:
        history, counts = (value[name].cpu().numpy() for name in ('history', 'counts'))
        return HistoryBuffer(history, counts, value['max_length'])
    return {key: restore_histories(part) for key, part in value.items()}


def read_checkpoint(path: str | Path, map_location='cpu', trusted: bool = False):
    """Read a checkpoint without running any code in it.

    Histories and NumPy arrays, as in the checkpoints of OpenMMLab's model zoos, are allowed beside plain values.

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
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint at {path}')
    if path.suffix == _SAFETENSORS:
        return _read_safetensors(path)
    _allow_data_classes()
    try:
        return torch.load(path, map_location=map_location, weights_only=not trusted)
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


def _read_safetensors(path: Path) -> dict:
    """On the CPU, wherever the tensors go from there."""
    library = _safetensors()
    try:
        with library.safe_open(path, framework='pt') as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            meta = (file.metadata() or {}).get('meta', '{}')
    except library.SafetensorError as error:
        raise ValueError(f'{path} is damaged or no safetensors file: {error}') from error
    return dict(state_dict=state_dict, meta=json.loads(meta))


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

    def load_from_local(filename: str, map_location):
        return read_checkpoint(filename, map_location, trusted)

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


def fill_model(model: nn.Module, config: str, path: str, trusted: bool = False) -> dict:
    """Load a checkpoint that must have all weights of a model.

    Args:
        model: Any.
        config: Its config file, for the error.
        path: Checkpoint.
        trusted: As of :func:`read_checkpoint`.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not fill the model, or cannot be read.
    """
    checkpoint = read_checkpoint(path, trusted=trusted)
    problem = load_whole(model, checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else {})
    if problem:
        raise ValueError(f'{path} does not fill the model of {config}: it {problem}')
    return checkpoint


def load_whole(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    """Load weights that must fill a model.

    Args:
        model: Any.
        state_dict: Its weights, also with 'module.' before their names, as DDP's.

    Returns:
        What is wrong, to come after 'it': tensors are missing or, after the model's own hooks, of other shapes. '' if
        nothing is.
    """
    weights = OrderedDict((key.removeprefix('module.'), value) for key, value in state_dict.items())
    weights._metadata = getattr(state_dict, '_metadata', None)
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


def newest_checkpoint(
    folder: str | Path, trusted: bool = False, names: Sequence[str] = CHECKPOINTS
) -> tuple[str, dict] | None:
    """The newest checkpoint of a training that can be read, and its content; None where there is none.

    Args:
        folder: Work dir of the training. The file that ``last_checkpoint`` names comes first, then the others by their
            time; those that cannot be read are logged.
        trusted: As of :func:`read_checkpoint`.
        names: Patterns of their names. Defaults to those of mmengine and of a training that was stopped.

    Raises:
        ValueError: There are checkpoints, but none can be read.
    """
    problems = []
    for path in _by_age(Path(folder), names):
        try:
            checkpoint = read_resumable(path, trusted)
        except ValueError as error:
            problems.append(str(error))
            print_log(f'Cannot resume from this one, going back to the one before: {error}', 'current', logging.WARNING)
            continue
        return str(path), checkpoint
    if problems:
        raise ValueError(f'no checkpoint in {folder} can be read: {"; ".join(problems)}')
    pointer = Path(folder) / 'last_checkpoint'
    if pointer.is_file():
        raise ValueError(f'{pointer} names {pointer.read_text().strip()}, which is not there; to start anew, remove it')
    return None


def read_resumable(path: str | Path, trusted: bool = False) -> dict:
    """As :func:`read_checkpoint`, of a training that can be resumed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or has no state of an optimizer or no place in a training.
    """
    checkpoint = read_checkpoint(path, trusted=trusted)
    if not isinstance(checkpoint, dict) or 'optimizer' not in checkpoint:
        raise ValueError(f'{path} is no checkpoint to resume: it has no state of an optimizer')
    if 'iter' not in (checkpoint.get('meta') or {}):
        raise ValueError(f'{path} is no checkpoint to resume: it does not say at which iteration it was saved')
    return checkpoint


def _by_age(folder: Path, names: Sequence[str]) -> list[Path]:
    """Training checkpoints of a work dir, the one of ``last_checkpoint`` first, then the newest first."""
    pointer = folder / 'last_checkpoint'
    last = Path(pointer.read_text().strip()) if pointer.is_file() else folder / 'none'
    if last.is_file() and not (folder / last.name).is_file():
        folder = last.parent  # checkpoints outside of the work dir
    files = {file for name in names for file in folder.glob(name)}
    if last.is_file():
        files.add(folder / last.name)  # which may be named otherwise
    return sorted(files, key=lambda file: (file.name == last.name, file.stat().st_mtime_ns), reverse=True)
