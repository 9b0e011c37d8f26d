"""Running exported networks on CPUs, with as many threads as PyTorch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from .formats import SUFFIXES, require_trust, without_warnings

Session = Callable[[np.ndarray], Sequence[np.ndarray]]  # images (N, C, H, W) to a model's outputs


def open_session(path: str | Path, dtype: str = 'float32', trusted: bool = False) -> Session:
    """Open an exported file of any format in its runtime.

    ``dtype`` is that of matrix products: 'float32', or 'bfloat16' with OpenVINO.

    Raises:
        ValueError: The format or the CPU does not support ``dtype``; see also :func:`.formats.require_trust`.
    """
    require_trust(path, trusted)
    form = next(form for form, suffix in SUFFIXES.items() if suffix == Path(path).suffix)
    if dtype not in (('float32', 'bfloat16') if form == 'openvino' else ('float32',)):
        allowed = "'float32' or 'bfloat16'" if form == 'openvino' else "'float32'"
        raise ValueError(f'dtype must be {allowed} for {form} files, but got {dtype!r}')
    if form != 'torch-export':
        return RUNTIMES['openvino' if form == 'openvino' else 'onnxruntime'](str(path), dtype)
    with without_warnings():
        module = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


def _onnxruntime(exported: bytes | str, dtype: str) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    # Spinning threads would slow down what runs next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(exported, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _openvino(exported: bytes | str, dtype: str) -> Session:
    import openvino

    core = openvino.Core()
    hint = {'float32': 'f32', 'bfloat16': 'bf16'}[dtype]  # by default it depends on the CPU
    properties = dict(
        INFERENCE_PRECISION_HINT=hint, INFERENCE_NUM_THREADS=torch.get_num_threads(), PERFORMANCE_HINT='LATENCY'
    )
    compiled = core.compile_model(core.read_model(exported), 'CPU', properties)
    precision = compiled.get_property('INFERENCE_PRECISION_HINT').get_type_name()
    if precision != hint:
        raise ValueError(f'this CPU does not support dtype {dtype!r}: OpenVINO would compute in {precision}')
    return lambda images: list(compiled(images).values())


# Each takes an ONNX model as bytes or the path of a file, and the dtype.
RUNTIMES: dict[str, Callable[[bytes | str, str], Session]] = {'onnxruntime': _onnxruntime, 'openvino': _openvino}
