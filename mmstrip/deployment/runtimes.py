"""Running exported networks on CPUs, with as many threads as PyTorch."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from .formats import PACKAGES, SUFFIXES, quietly, require_trust

# What each needs beside PyTorch, of those that are not PyTorch itself.
RUNTIMES = {'onnxruntime': PACKAGES['onnx'], 'openvino': PACKAGES['openvino']}
Session = Callable[[np.ndarray], Sequence[np.ndarray]]


def check_runtime(runtime: str, dtype: str, device: str, modes: Sequence[str]) -> None:
    """Whether a runtime can do what is asked.

    Args:
        runtime: One of :data:`RUNTIMES`.
        dtype: 'float32', or what products are computed in.
        device: Where the others run.
        modes: 'inference' or 'train'.

    Raises:
        ValueError: It is not installed, or cannot.
    """
    missing = [name for name in RUNTIMES[runtime] if find_spec(name) is None]
    if missing:
        raise ValueError(f'{runtime} needs what is not installed here: pip install {" ".join(missing)}')
    if list(modes) != ['inference']:
        raise ValueError(f'{runtime} runs inference alone, but the modes are {", ".join(modes)}')
    if device != 'cpu':
        raise ValueError(f'{runtime} is measured on CPUs alone, but the device is {device}')
    if dtype == 'float16' or (runtime, dtype) == ('onnxruntime', 'bfloat16'):
        raise ValueError(f'{runtime} does not compute in {dtype} on CPUs')


def start_session(runtime: str, exported: bytes | str, dtype: str = 'float32') -> Session:
    """A function of images, (N, C, H, W), that gives a model's outputs.

    Args:
        runtime: One of :data:`RUNTIMES`.
        exported: ONNX, or the path of a file that the runtime reads.
        dtype: What products are computed in: 'float32', or with OpenVINO 'bfloat16'. Defaults to 'float32'.

    Raises:
        ValueError: The machine has no arithmetic of that type.
    """
    return {'onnxruntime': _onnxruntime, 'openvino': _openvino}[runtime](exported, dtype)


def open_session(path: str | Path, dtype: str = 'float32', trusted: bool = False) -> Session:
    """The same of an exported file of any format, in the runtime of its own: see :data:`.formats.SUFFIXES`.

    Raises:
        ValueError: The format or the machine does not compute in that type; see also :func:`.formats.require_trust`.
    """
    require_trust(path, trusted)
    form = next(form for form, suffix in SUFFIXES.items() if suffix == Path(path).suffix)
    if dtype not in (('float32', 'bfloat16') if form == 'openvino' else ('float32',)):
        raise ValueError(f'files of {form} compute in float32, those of openvino in bfloat16 too, but got {dtype!r}')
    if form in ('onnx', 'openvino'):
        return start_session('openvino' if form == 'openvino' else 'onnxruntime', str(path), dtype)
    with quietly():
        module = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


def _onnxruntime(exported: bytes | str, dtype: str) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; what it cannot fold is no news to users
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait for work would slow down what runs next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(exported, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _openvino(exported: bytes | str, dtype: str) -> Session:
    import openvino

    core = openvino.Core()
    hint = {'float32': 'f32', 'bfloat16': 'bf16'}[dtype]  # left alone, it is what suits the machine
    properties = dict(
        INFERENCE_PRECISION_HINT=hint, INFERENCE_NUM_THREADS=torch.get_num_threads(), PERFORMANCE_HINT='LATENCY'
    )
    compiled = core.compile_model(core.read_model(exported), 'CPU', properties)
    precision = compiled.get_property('INFERENCE_PRECISION_HINT').get_type_name()
    if precision != hint:
        raise ValueError(f'openvino computes in {precision} where {hint} was asked for: this CPU does not have it')
    return lambda images: list(compiled(images).values())
