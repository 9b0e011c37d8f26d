"""Files of exported networks: trace a network once and write it in one of three formats, with its description."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

if TYPE_CHECKING:
    import onnx
    import openvino

# File suffix of each format, and the packages that formats and int8 need besides PyTorch.
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2', 'openvino': '.xml'}
PACKAGES = {
    'onnx': ('onnx', 'onnxscript', 'onnxruntime'),
    'openvino': ('onnx', 'onnxscript', 'openvino'),
    'int8': ('nncf',),
}
HALF_FORMATS = ('onnx', 'openvino')  # formats with float16 weights
KEY = 'mmstrip'  # key of the description, JSON
EXTRA = f'{KEY}.json'  # file with the description in .pt2
DYNAMIC_SIDES = (64, 8192)  # pixels; at 32, the single token of the last map would become a constant
MAX_BATCH = 65535
_SMALL = 1024  # values; smaller tensors stay in float32


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the warnings of exporters."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def check_format(form: str, out: str | Path, half: bool = False, opset: int | None = None) -> None:
    """Check that a format supports the settings.

    Raises:
        FileNotFoundError: The folder of ``out`` is missing.
        ValueError: The format does not support them, its packages are not installed, or ``out`` has another suffix.
    """
    if form not in SUFFIXES:
        raise ValueError(f'format must be one of {", ".join(SUFFIXES)}, but got {form!r}')
    if Path(out).suffix != SUFFIXES[form]:
        raise ValueError(f'a file in {form} format must end in {SUFFIXES[form]}, but got {out}')
    if not Path(out).absolute().parent.is_dir():
        raise FileNotFoundError(f'{out}: no folder at {Path(out).parent}')
    check_packages(form)
    for name, asked in (('--half', half), ('--opset', opset is not None)):
        if asked and form not in HALF_FORMATS:
            raise ValueError(f'{name} is for {" and ".join(HALF_FORMATS)}, but the format is {form}')


def check_packages(form: str) -> None:
    """Raise ValueError if packages of a format (:data:`PACKAGES`) are not installed."""
    missing = [name for name in PACKAGES.get(form, ()) if find_spec(name) is None]
    if missing:
        raise ValueError(f'{form} needs packages that are not installed: pip install {" ".join(missing)}')


def require_trust(path: str | Path, trusted: bool) -> None:
    """Check that a file may be opened.

    Raises:
        ValueError: It is an untrusted ``.pt2``, a program that runs code when PyTorch opens it.
    """
    if Path(path).suffix == SUFFIXES['torch-export'] and not trusted:
        raise ValueError(
            f'{path} runs code when it is opened. If you trust its author, pass trusted=True or --trust-checkpoints; '
            '.onnx and .xml files run no code'
        )


def trace(model: nn.Module, images: Tensor, dynamic_batch: bool = False, dynamic_size: bool = False) -> ExportedProgram:
    """Trace a model into one graph of PyTorch operations.

    Args:
        model: In evaluation mode, with float32 weights on the CPU.
        images: (N, C, H, W); the graph has these sizes unless they are dynamic.
        dynamic_batch: Allow N from 1 to 65,535. Defaults to False.
        dynamic_size: Allow H and W within :data:`DYNAMIC_SIDES`. Defaults to False.
    """
    dims = {}
    if dynamic_batch:
        dims[0] = Dim('batch', min=1, max=MAX_BATCH)
    if dynamic_size:
        least, most = DYNAMIC_SIDES
        dims.update({i: Dim(side, min=least, max=most) for i, side in ((2, 'height'), (3, 'width'))})
    with without_warnings(), torch.no_grad():
        return torch.export.export(
            model,
            (images,),
            dynamic_shapes=(dims or None,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=dynamic_size,
        )


def to_onnx(
    program: ExportedProgram, names: Sequence[str] = (), opset: int | None = None, optimize: bool = True
) -> 'onnx.ModelProto':
    """Convert a traced model to ONNX.

    Args:
        program: See :func:`trace`.
        names: Names of its outputs. Defaults to PyTorch's.
        opset: ONNX opset version. Defaults to PyTorch's choice.
        optimize: Simplify the graph, which takes a third of the conversion. Without, ONNX Runtime is 1.6 times slower;
            OpenVINO is not. Defaults to True.

    Raises:
        ValueError: PyTorch cannot write the model in that opset.
    """
    with without_warnings():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            optimize=optimize,
            opset_version=opset,
            input_names=['images'],
            output_names=list(names) or None,
        )
    model = exported.model_proto
    written = next(item.version for item in model.opset_import if not item.domain)
    if opset not in (None, written):  # PyTorch only warns
        raise ValueError(f'opset must be one that PyTorch supports for this model, such as {written}, but got {opset}')
    return model


def _drop_traces(model: 'onnx.ModelProto') -> None:
    """Drop the source lines and PyTorch nodes that operations are annotated with."""
    graph, nodes = model.graph, [node for function in model.functions for node in function.node]
    for item in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *nodes):
        del item.metadata_props[:]
    del graph.value_info[:]


def halve(model: 'onnx.ModelProto') -> None:
    """Store an ONNX model's weights in float16; computation stays in float32."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < _SMALL:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype('float16'), f'{name}.half'))
        casts.append(helper.make_node('Cast', [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def to_openvino(model: 'onnx.ModelProto') -> 'openvino.Model':
    """Convert an ONNX model to OpenVINO."""
    import openvino
    from openvino.passes import ConstantFolding, Manager

    parsed = openvino.Core().read_model(model.SerializeToString())
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(parsed)
    return parsed


def write(path: str | Path, model: nn.Module, images: Tensor, about: dict) -> None:
    """Trace a model and write it to a file; for OpenVINO two, .xml and .bin.

    Args:
        path: File to write.
        model, images: See :func:`trace`.
        about: Description of plain values, with the attributes of :class:`.export.Export` and the names of 'outputs'.
    """
    form, text = about['format'], json.dumps(about)
    if about['task'] == 'detector':
        from .mmdeploy.rewriters import trace_detector

        with without_warnings():
            written = trace_detector(model, images, about['outputs'], about['opset'])
    else:
        program = trace(model, images, about['dynamic_batch'], about['dynamic_size'])
        if form == 'torch-export':
            with without_warnings():
                torch.export.save(program, str(path), extra_files={EXTRA: text})
            return
        written = to_onnx(program, about['outputs'], about['opset'], optimize=form == 'onnx')
    _drop_traces(written)
    if form == 'onnx' and about['half']:
        halve(written)
    store(written if form == 'onnx' else to_openvino(written), path, text, about['half'])


def store(model: 'onnx.ModelProto | openvino.Model', path: str | Path, about: str, half: bool = False) -> None:
    """Write an ONNX or, by the suffix, OpenVINO model with its description; ``half`` stores OpenVINO in float16."""
    if Path(path).suffix == SUFFIXES['onnx']:
        import onnx

        onnx.helper.set_model_props(model, {KEY: about})
        onnx.save(model, path)
    else:
        import openvino

        model.set_rt_info(about, [KEY])
        openvino.save_model(model, path, compress_to_fp16=half)


def files_of(path: str | Path) -> list[Path]:
    """The files of an export; for OpenVINO the weights first, then the .xml that is opened."""
    path = Path(path)
    return [path.with_suffix('.bin'), path] if path.suffix == SUFFIXES['openvino'] else [path]


@contextmanager
def written_atomically(out: str | Path) -> Iterator[Path]:
    """Give a temporary path to write an export to, and move it to ``out`` if the block succeeds.

    Raises:
        OSError: The folder of ``out`` is not writable.
    """
    out = Path(out).absolute()
    with tempfile.TemporaryDirectory(prefix='.export-', dir=out.parent) as folder:
        made = Path(folder) / out.name
        yield made
        for file, other in zip(files_of(made), files_of(out)):
            os.replace(file, other)
