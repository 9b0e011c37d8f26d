"""The description in an exported file: read as data and fully checked, as files may come from anybody."""

import json
import reprlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .formats import DYNAMIC_SIDES, EXTRA, KEY, SUFFIXES, files_of, require_trust

Shape = Sequence[int | None] | None  # None: unknown or dynamic
Rule = tuple[str, Callable[[object], bool]]  # what is allowed, in words, and the check of a value


@dataclass
class Content:
    """Content of a file: its description (JSON or ''), and the input and outputs of its graph, if known."""

    text: str
    dtype: str | None = None
    input: Shape = None
    outputs: Sequence[Shape] | None = None


def read_about(path: str | Path, trusted: bool = False) -> dict:
    """The description in a file written by ``tools/deployment/export.py``.

    Raises:
        FileNotFoundError: The file, or the .bin of an .xml, is missing.
        ImportError: Its runtime is not installed.
        OSError: It cannot be opened.
        ValueError: It is damaged, of another kind, without a valid description, or an untrusted ``.pt2``.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES.values():
        raise ValueError(f'an exported file ends in {", ".join(SUFFIXES.values())}, but got {path}')
    for file in files_of(path):
        if not file.is_file():
            raise FileNotFoundError(f'no exported file at {file}')
        file.open('rb').close()  # raises the system's error
    require_trust(path, trusted)
    try:
        content = _READ[path.suffix](path)
        about = json.loads(content.text) if content.text else {}
    except ImportError as error:
        raise ImportError(f'{path} needs {error.name}, which is not installed: pip install {error.name}') from error
    except Exception as error:  # each library has its own
        reason = str(error).strip().partition('\n')[0]
        raise ValueError(f'{path} is damaged or not an exported file: {reason}') from error
    if not isinstance(about, dict) or 'task' not in about:
        raise ValueError(f'{path} has no description of the export; write it with tools/deployment/export.py')
    check_about(about, path)
    _check_graph(content, about, path)
    return about


def _number(least: float, most: float, kinds: tuple[type, ...] = (int, float)) -> Rule:
    words = f'a {"" if float in kinds else "whole "}number from {least:g} to {most:g}'
    return words, lambda value: type(value) in kinds and least <= value <= most


def _one_of(*values) -> Rule:
    kinds = {type(value) for value in values}
    return f'one of {", ".join(map(str, values))}', lambda value: type(value) in kinds and value in values


def _list_of(rule: Rule, most: int, least: int = 0) -> Rule:
    words = f'a list of {least} to {most}, each {rule[0]}' if least < most else f'a list of {most}, each {rule[0]}'
    return words, lambda value: type(value) is list and least <= len(value) <= most and all(map(rule[1], value))


def _either(*rules: Rule) -> Rule:
    return ' or '.join(words for words, _ in rules), lambda value: any(holds(value) for _, holds in rules)


def _is_text(value) -> bool:
    return type(value) is str and len(value) <= 1000 and not any('\ud800' <= letter <= '\udfff' for letter in value)


_NONE: Rule = ('null', lambda value: value is None)
_BOOL = _one_of(True, False)
_TEXT: Rule = ('text of up to 1000 characters', _is_text)
_SIDE = _number(1, DYNAMIC_SIDES[1], (int,))  # limits shapes to MAX_PIXELS
_SIDES = _either(_SIDE, _list_of(_SIDE, 2, 2))
_FACTOR = _number(0.01, 100)
_RESIZED = dict(
    interpolation=_one_of('nearest', 'bilinear', 'bicubic', 'area', 'lanczos'),
    backend=_one_of('cv2', 'pillow'),
    clip_object_border=_BOOL,
)
_RESIZE = dict(
    _RESIZED,
    scale=_either(_SIDES, _NONE),
    scale_factor=_either(_FACTOR, _list_of(_FACTOR, 2, 2), _NONE),
    keep_ratio=_BOOL,
)
# Required and optional fields: of each step of a test pipeline, and of a description.
Fields = tuple[dict[str, Rule], dict[str, Rule]]
STEPS: dict[str, Fields] = {
    'Resize': ({}, _RESIZE),
    'ResizeEdge': (dict(scale=_SIDE), dict(_RESIZED, edge=_one_of('short', 'long', 'width', 'height'))),
    'CenterCrop': (dict(crop_size=_SIDES), dict(auto_pad=_BOOL, clip_object_border=_BOOL)),
}
_STEP: Rule = (f'a step of {", ".join(STEPS)}', lambda value: type(value) is dict and value.get('type') in list(STEPS))
ABOUT: Fields = (
    dict(
        format=_one_of(*SUFFIXES),
        task=_one_of('classifier', 'segmentor', 'detector', 'backbone', 'neck'),
        classes=_either(_NONE, _list_of(_TEXT, 100_000, 1)),
        channels=_number(1, 1024, (int,)),
        shape=_list_of(_SIDE, 2, 2),
        steps=_list_of(_STEP, 10),
        mean=_either(_NONE, _list_of(_number(-1e6, 1e6), 1024, 1)),
        std=_either(_NONE, _list_of(_number(1e-6, 1e6), 1024, 1)),
        outputs=_list_of(_TEXT, 100, 1),
        align_corners=_either(_BOOL, _NONE),
        threshold=_either(_number(0, 1), _NONE),
        **dict.fromkeys(('scores', 'flip', 'normalize', 'dynamic_batch', 'dynamic_size', 'half'), _BOOL),
    ),
    dict(pad_value=_either(_number(-1e6, 1e6), _NONE), int8=_BOOL),
)


def check_about(about: dict, path: str | Path) -> None:
    """Check a description, parsed from JSON, of the file at ``path``.

    Raises:
        ValueError: A field is missing, invalid or contradicts another; the error names the file and the field.
    """
    _check_fields(about, ABOUT, path)
    for i, step in enumerate(about['steps']):
        _check_fields(step, STEPS[step['type']], path, f'steps.{i}.')
        for name in step.keys() - {'type'}.union(*STEPS[step['type']]):
            raise _field_error(path, f'steps.{i}.{name}', f'absent, as {step["type"]} has no such option', step[name])
        if step.get('backend') == 'pillow' and step.get('interpolation') == 'area':
            allowed = 'nearest, bilinear, bicubic or lanczos with pillow'
            raise _field_error(path, f'steps.{i}.interpolation', allowed, 'area')
        if step['type'] == 'Resize' and step.get('scale') is None and step.get('scale_factor') is None:
            raise ValueError(f'{path}: steps.{i} must have scale or scale_factor, but has neither')
    channels, suffix = about['channels'], Path(path).suffix
    has_masks = about['task'] == 'detector' and len(about['outputs']) > 2
    for field, words, holds in (
        ('format', f'the format of {suffix} files', SUFFIXES[about['format']] == suffix),
        ('std', 'given if and only if mean is', (about['mean'] is None) == (about['std'] is None)),
        ('mean', f'one number or {channels}, one per channel', len(about['mean'] or '-') in (1, channels)),
        ('std', f'one number or {channels}, one per channel', len(about['std'] or '-') in (1, channels)),
        ('threshold', 'a number for a detector with masks', about['threshold'] is not None or not has_masks),
    ):
        if not holds:
            raise _field_error(path, field, words, about[field])


def _check_fields(values: dict, fields: Fields, path: str | Path, start: str = '') -> None:
    needed, optional = fields
    for name, (words, holds) in {**needed, **optional}.items():
        if name in values and not holds(values[name]):
            raise _field_error(path, start + name, words, values[name])
        if name in needed and name not in values:
            raise ValueError(f'{path} has no field {start}{name}; write it with tools/deployment/export.py')


def _field_error(path: str | Path, field: str, words: str, value) -> ValueError:
    return ValueError(f'{path}: {field} must be {words}, but is {reprlib.repr(value)}')


def _check_graph(content: Content, about: dict, path: Path) -> None:
    """Check a description against the file's graph."""
    if content.outputs is None:
        return
    expected = (
        None if about['dynamic_batch'] else 1,
        about['channels'],
        *((None, None) if about['dynamic_size'] else about['shape']),
    )
    dtype = 'uint8' if about['normalize'] else 'float32'
    if content.dtype != dtype or content.input is None or tuple(content.input) != expected:
        says = f'{content.dtype} {_shape_text(content.input)}'
        raise _field_error(path, 'shape', f"that of the graph's input, {says}", f'{dtype} {_shape_text(expected)}')
    if not outputs_fit(about, content.outputs):
        says = ', '.join(map(_shape_text, content.outputs))
        names = reprlib.repr(about['outputs'])
        raise ValueError(f'{path}: outputs of a {about["task"]}, {names}, cannot be those of the graph, {says}')


def _shape_text(shape: Shape) -> str:
    return 'of unknown shape' if shape is None else ' x '.join('?' if side is None else str(side) for side in shape)


def outputs_fit(about: dict, shapes: Sequence[Shape]) -> bool:
    """Whether output shapes, which may be partly unknown, agree with a description."""
    task, count = about['task'], len(about['classes'] or ()) or None
    if task == 'segmentor' and [shape[1] for shape in shapes if shape and len(shape) == 4] == [1]:
        count = 1  # of two classes
    expected = {
        'classifier': [(None, count)],
        'segmentor': [(None, count, None, None)],
        'detector': [(1, None, 5), (1, None), (1, None, None, None)][: max(2, len(about['outputs']))],
    }.get(task, [(None,) * 4] * len(about['outputs']))
    return len(shapes) == len(expected) and all(map(_agrees, shapes, expected))


def _agrees(shape: Shape, expected: Sequence[int | None]) -> bool:
    if shape is None:
        return True
    sides = zip(shape, expected)
    return len(shape) == len(expected) and all(own == other or None in (own, other) for own, other in sides)


def _read_onnx(path: Path) -> Content:
    """Refuses weights in other files, which ONNX Runtime would read."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    if any(tensor.external_data or tensor.data_location for tensor in _tensors(model)):
        raise ValueError('its weights are in other files, but an exported file holds its own')
    types = {onnx.TensorProto.FLOAT: 'float32', onnx.TensorProto.UINT8: 'uint8'}
    text = next((item.value for item in model.metadata_props if item.key == KEY), '')
    stored = {tensor.name for tensor in model.graph.initializer}
    (images,) = (value for value in model.graph.input if value.name not in stored)
    shapes = [_shape_of(value.type.tensor_type) for value in (images, *model.graph.output)]
    return Content(text, types.get(images.type.tensor_type.elem_type), shapes[0], shapes[1:])


def _tensors(message) -> Iterator:
    """All tensors in an ONNX message, including those in attributes, functions and subgraphs."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, 'ListFields') else value:  # protobuf < 6.31 has no is_repeated
            if field.message_type.name == 'TensorProto':
                yield part
            else:
                yield from _tensors(part)


def _shape_of(kind) -> Shape:
    if not kind.HasField('shape'):
        return None
    return [side.dim_value if side.HasField('dim_value') else None for side in kind.shape.dim]


def _read_openvino(path: Path) -> Content:
    """Only XML: OpenVINO goes by content, not by name, and would read other formats too."""
    import openvino

    with path.open('rb') as file:
        if not file.read(100).lstrip().startswith((b'<?xml', b'<net')):
            raise ValueError('it is not XML')
    model = openvino.Core().read_model(path)
    (images,), types = model.inputs, {'f32': 'float32', 'u8': 'uint8'}
    shapes = [_partial_shape(port.get_partial_shape()) for port in (images, *model.outputs)]
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else ''
    return Content(text, types.get(images.get_element_type().get_type_name()), shapes[0], shapes[1:])


def _partial_shape(shape) -> Shape:
    if shape.rank.is_dynamic:
        return None
    return [side.get_length() if side.is_static else None for side in shape]


def _read_pt2(path: Path) -> Content:
    """Reads the zip file directly, as PyTorch would run the code in it."""
    with zipfile.ZipFile(path) as archive:
        entry = next((entry for entry in archive.infolist() if Path(entry.filename).name == EXTRA), None)
        return Content(archive.read(entry).decode() if entry else '')


_READ = {'.onnx': _read_onnx, '.xml': _read_openvino, '.pt2': _read_pt2}
