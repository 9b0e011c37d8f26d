"""Models in ONNX Runtime and OpenVINO: exported once, run on CPUs with as many threads as PyTorch."""

import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

# What each needs beside PyTorch.
RUNTIMES = {
    'onnxruntime': ('onnx', 'onnxscript', 'onnxruntime'),
    'openvino': ('onnx', 'onnxscript', 'openvino'),
}
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


def export(model: nn.Module, images: Tensor) -> bytes:
    """A model as ONNX, for images of this very shape.

    Args:
        model: In evaluation mode, with float32 weights on the CPU.
        images: (N, C, H, W).
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    finally:
        logging.disable(logging.NOTSET)
    return program.model_proto.SerializeToString()


def start_session(runtime: str, exported: bytes, dtype: str) -> Session:
    """A function of images, (N, C, H, W) in float32, that gives a model's outputs.

    Args:
        runtime: One of :data:`RUNTIMES`.
        exported: As of :func:`export`.
        dtype: 'float32', or with OpenVINO 'bfloat16'.

    Raises:
        ValueError: The machine has no arithmetic of that type.
    """
    return {'onnxruntime': _onnxruntime, 'openvino': _openvino}[runtime](exported, dtype)


def _onnxruntime(exported: bytes, dtype: str) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait for work would slow down what runs next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(exported, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _openvino(exported: bytes, dtype: str) -> Session:
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
