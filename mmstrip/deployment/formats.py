"""Files of exported networks: a network is traced once and written as one of three formats, with what describes it."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

# How the files of each format end, and what they and int8 need beside PyTorch.
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2', 'openvino': '.xml'}
PACKAGES = {
    'onnx': ('onnx', 'onnxscript', 'onnxruntime'),
    'openvino': ('onnx', 'onnxscript', 'openvino'),
    'int8': ('nncf',),
}
HALVED = ('onnx', 'openvino')  # formats whose weights can be stored in float16
KEY = 'mmstrip'  # of the description, JSON
EXTRA = f'{KEY}.json'  # the same of .pt2, a file in it
DYNAMIC_SIDES = (64, 8192)  # pixels; at 32 the last map would have one token, which the tracer takes for a constant
MAX_BATCH = 65535
_SMALL = 1024  # values of tensors that are not worth halving


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of exporters."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def check_format(form: str, out: str | Path, half: bool = False, opset: int | None = None) -> None:
    """Whether a format can do what is asked.

    Raises:
        FileNotFoundError: The folder of ``out`` is missing.
        ValueError: It cannot, it needs what is not installed, or ``out`` ends otherwise than its files do.
    """
    if form not in SUFFIXES:
        raise ValueError(f'the format must be one of {", ".join(SUFFIXES)}, but got {form!r}')
    if Path(out).suffix != SUFFIXES[form]:
        raise ValueError(f'files of {form} end in {SUFFIXES[form]}, but got {out}')
    if not Path(out).absolute().parent.is_dir():
        raise FileNotFoundError(f'{out}: there is no folder {Path(out).parent}')
    check_packages(form)
    for name, asked in (('--half', half), ('--opset', opset is not None)):
        if asked and form not in HALVED:
            raise ValueError(f'{name} is for {" and ".join(HALVED)}, but the format is {form}')


def check_packages(form: str) -> None:
    """Raises ValueError if what a format needs is not installed; see :data:`PACKAGES`."""
    missing = [name for name in PACKAGES.get(form, ()) if find_spec(name) is None]
    if missing:
        raise ValueError(f'{form} needs what is not installed here: pip install {" ".join(missing)}')


def require_trust(path: str | Path, trusted: bool) -> None:
    """Whether a file may be opened.

    Raises:
        ValueError: It is a ``.pt2``, a program that runs code as PyTorch opens it, and not trusted.
    """
    if Path(path).suffix == SUFFIXES['torch-export'] and not trusted:
        raise ValueError(
            f'{path} would run code when it is opened: trusted=True or --trust-checkpoints opens it if you trust its '
            'maker; .onnx and .xml need no trust'
        )


def trace(model: nn.Module, images: Tensor, dynamic_batch: bool = False, dynamic_size: bool = False) -> ExportedProgram:
    """A model as one graph of PyTorch's operations.

    Args:
        model: In evaluation mode, with float32 weights on the CPU.
        images: (N, C, H, W), that sizes are taken of where they are not dynamic.
        dynamic_batch: N may be any from 1 to 65,535. Defaults to False.
        dynamic_size: H and W may be any within :data:`DYNAMIC_SIDES`. Defaults to False.
    """
    dims = {}
    if dynamic_batch:
        dims[0] = Dim('batch', min=1, max=MAX_BATCH)
    if dynamic_size:
        least, most = DYNAMIC_SIDES
        dims.update({i: Dim(side, min=least, max=most) for i, side in ((2, 'height'), (3, 'width'))})
    with quietly(), torch.no_grad():
        return torch.export.export(
            model,
            (images,),
            dynamic_shapes=(dims or None,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=dynamic_size,
        )


def to_onnx(program: ExportedProgram, names: Sequence[str] = (), opset: int | None = None, optimize: bool = True):
    """A traced model as one of ONNX.

    Args:
        program: See :func:`trace`.
        names: Of its outputs. Defaults to PyTorch's.
        opset: Version of ONNX's operators. Defaults to PyTorch's choice.
        optimize: Simplify the graph, a third of the time. ONNX Runtime takes 1.6 times as long without, OpenVINO not.
            Defaults to True.

    Raises:
        ValueError: PyTorch cannot write the model in that opset.
    """
    with quietly():
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
    if opset not in (None, written):  # of which PyTorch only warns
        raise ValueError(f'opset must be one in which PyTorch can write the model, but got {opset}: it wrote {written}')
    return model


def _drop_traces(model) -> None:
    """Drop the lines of Python code and the PyTorch graph that each operation came from."""
    graph, nodes = model.graph, [node for function in model.functions for node in function.node]
    for item in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *nodes):
        del item.metadata_props[:]
    del graph.value_info[:]


def halve(model) -> None:
    """Store an ONNX model's weights in float16; they are computed with in float32."""
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


def to_openvino(model):
    """A model of ONNX as one of OpenVINO."""
    import openvino
    from openvino.passes import ConstantFolding, Manager

    parsed = openvino.Core().read_model(model.SerializeToString())
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(parsed)
    return parsed


def write(path: str | Path, model: nn.Module, images: Tensor, about: dict) -> None:
    """Trace a model and write it as a file; of OpenVINO two, .xml and .bin.

    Args:
        path: File to write.
        model, images: See :func:`trace`.
        about: Description, of plain values, with the attributes of :class:`.export.Export` and the names of 'outputs'.
    """
    form, text = about['format'], json.dumps(about)
    if about['task'] == 'detector':
        from .mmdeploy.rewriters import trace_detector

        with quietly():
            written = trace_detector(model, images, about['outputs'], about['opset'])
    else:
        program = trace(model, images, about['dynamic_batch'], about['dynamic_size'])
        if form == 'torch-export':
            with quietly():
                torch.export.save(program, str(path), extra_files={EXTRA: text})
            return
        written = to_onnx(program, about['outputs'], about['opset'], optimize=form == 'onnx')
    _drop_traces(written)
    if form == 'onnx' and about['half']:
        halve(written)
    store(written if form == 'onnx' else to_openvino(written), path, text, about['half'])


def store(model, path: str | Path, about: str, half: bool = False) -> None:
    """Write a model of ONNX, or of OpenVINO by the path's ending, with its description; of OpenVINO in float16."""
    if Path(path).suffix == SUFFIXES['onnx']:
        import onnx

        onnx.helper.set_model_props(model, {KEY: about})
        onnx.save(model, path)
    else:
        import openvino

        model.set_rt_info(about, [KEY])
        openvino.save_model(model, path, compress_to_fp16=half)


def files_of(path: str | Path) -> list[Path]:
    """The files of an export: of OpenVINO the weights too, first, as the other one is what is opened."""
    path = Path(path)
    return [path.with_suffix('.bin'), path] if path.suffix == SUFFIXES['openvino'] else [path]


@contextmanager
def written_whole(out: str | Path) -> Iterator[Path]:
    """A path to write an export to, which takes the place of ``out`` when all is well; until then older files stay.

    Raises:
        OSError: The folder of ``out`` cannot be written.
    """
    out = Path(out).absolute()
    with tempfile.TemporaryDirectory(prefix='.export-', dir=out.parent) as folder:
        made = Path(folder) / out.name
        yield made
        for file, other in zip(files_of(made), files_of(out)):
            os.replace(file, other)
