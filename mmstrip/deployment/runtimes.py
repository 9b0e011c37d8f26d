"""Running exported networks on CPUs, with as many threads as PyTorch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from .formats import SUFFIXES, quietly, require_trust

Session = Callable[[np.ndarray], Sequence[np.ndarray]]  # images (N, C, H, W) to a model's outputs


def open_session(path: str | Path, dtype: str = 'float32', trusted: bool = False) -> Session:
    """An exported file of any format in the runtime of its own.

    Args:
        path: The file.
        dtype: What products are computed in: 'float32', or with OpenVINO 'bfloat16'. Defaults to 'float32'.
        trusted: See :func:`.formats.require_trust`. Defaults to False.

    Raises:
        ValueError: The format or the machine does not compute in that type; see also :func:`.formats.require_trust`.
    """
    require_trust(path, trusted)
    form = next(form for form, suffix in SUFFIXES.items() if suffix == Path(path).suffix)
    if dtype not in (('float32', 'bfloat16') if form == 'openvino' else ('float32',)):
        raise ValueError(f'files of {form} compute in float32, those of openvino in bfloat16 too, but got {dtype!r}')
    if form != 'torch-export':
        return RUNTIMES['openvino' if form == 'openvino' else 'onnxruntime'](str(path), dtype)
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


# Of ONNX as bytes or of a file's path, and the type of products.
RUNTIMES: dict[str, Callable[[bytes | str, str], Session]] = {'onnxruntime': _onnxruntime, 'openvino': _openvino}
