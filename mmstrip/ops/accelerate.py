"""``accelerate``, ``restore`` and ``status``: make a model faster, undo it, and say what runs on this machine."""

import torch
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from torch import nn

from ..models.stock import class_of
from ..models.strip_mlp import StripMLP, StripMLPBlock
from . import extension
from .channel_mlp import FastChannelMixingBlock
from .context import MISSING, UNKNOWN, takes
from .fast import Fast, Types
from .local_strips import FastLocalStripMixing
from .residual import FastStripMLPBlock
from .stage import FastStage, forget_packed
from .strip_layer import FastStripMLPLayer
from .strip_mixing import FastCascadeGroupStripMixing, FastStripMixingBlock

CLASSES = (
    FastStripMLPLayer,
    FastCascadeGroupStripMixing,
    FastLocalStripMixing,
    FastStripMixingBlock,
    FastChannelMixingBlock,
    FastStripMLPBlock,
    FastStage,
)
INSTRUCTIONS = dict(avx2='AVX2, ', avx512='AVX-512, ')
COMPILES = (2, 8)  # the first PyTorch whose compiler shares a graph among modules and returns float32 products
AUTHORS = ('torch', 'mmengine', 'mmcv', 'mmstrip')  # packages whose layers the faster implementations know


def accelerate(model: nn.Module, compile: bool | None = None) -> nn.Module:
    """Make the Strip-MLP in a model faster, in place; nothing changes but speed and rounding.

    The classes of its modules become subclasses, so parameters, names, state dict, hooks and copies stay the same. On
    CPUs native operators compute in float32 and bfloat16; a module whose layers are replaced, hooked or parametrized
    runs the reference. On GPUs PyTorch compiles each block, and the steps between the stages, in the first forward
    pass, which takes a minute or so; blocks with hooks inside run the reference, and so do networks in FSDP2 or with
    SyncBN in several processes. So does everything that is compiled, traced, exported or transformed by others. The log
    says what runs faster, and why the rest does not.

    Call it when the model is on its device and wrapped in DDP, but before parametrizations; call it again after layers
    were replaced, classes patched, or weights of a folded model pruned through ``.data``.

    Args:
        model: A model of any toolbox, wrapped or not.
        compile: Whether PyTorch compiles it. Defaults to None: on GPUs yes, on CPUs no.

    Returns:
        The model.
    """
    print_log(f'Strip-MLP: {change_classes(model, compile)}', 'current')
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`; returns the model.

    Raises:
        TypeError: Something else has changed a module's class since; nothing is undone then.
    """
    fast = {name: module for name, module in model.named_modules() if isinstance(module, Fast)}
    for name, module in fast.items():
        if class_of(module) is type(module):
            raise TypeError(
                f'restore knows the classes of mmstrip.accelerate, but {name or "the model"} is a '
                f'{type(module).__name__}, which something else has made of one: undo that first'
            )
    for module in fast.values():
        module.__class__ = module.reference
    return model


def status() -> str:
    """Say in one sentence what runs on this machine, on CPUs and on GPUs, and why not if not."""
    why_not = _why_unknown() or _why_no_compiler()
    gpus = f'GPUs run the reference, as {why_not}' if why_not else 'GPUs run compiled graphs'
    return f'{_native_status()}; {gpus}'


def _native_status() -> str:
    missing = MISSING or _why_unknown()
    if missing:
        return f'no compiled operators, the network is slower on CPUs: {missing}'
    loaded = f'the compiled operators are loaded ({extension.variant()}) and run float32'
    if takes(torch.bfloat16):
        return f'{loaded} and bfloat16 maps on CPUs'
    return f'{loaded} maps on CPUs; bfloat16 runs the reference, as it needs AVX512-BF16 and PyTorch 2.7'


def use(*implementation) -> None:
    """Removed; :func:`accelerate` replaces it."""
    raise RuntimeError(
        'mmstrip.ops.use is gone: models run the reference, mmstrip.accelerate(model) makes one faster, and '
        'mmstrip.restore(model) undoes that'
    )


def change_classes(model: nn.Module, compile: bool | None = None) -> str:
    """Do what :func:`accelerate` does, and return the line that it logs."""
    kinds = (StripMLP, *(fast.reference for fast in CLASSES))
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not modules:
        return f'there is none in this {type(model).__name__}'
    devices = {tensor.device.type for module in modules.values() for tensor in module.parameters()}
    if compile is None:
        compile = devices == {'cuda'}
    why_not = _why_not(modules) or (_why_not_compiled(modules) if compile else _why_not_native(devices))
    if why_not:
        restore(model)
        return f'the reference runs, as {why_not}'
    if compile:
        from . import compiled  # late, as PyTorch's compiler is slow to import
    _take_classes(model, modules, compiled.CLASSES if compile else CLASSES)
    if compile:
        return compiled.prepare(model)
    blocks = {name: module for name, module in modules.items() if isinstance(module, StripMLPBlock)}
    slow = list(filter(None, (_find_mismatch(name, block) for name, block in blocks.items())))
    fast = f'{len(blocks) - len(slow)} of {len(blocks)} blocks' if blocks else f'{len(modules)} modules'
    said = f'{fast} {_what_runs()}'
    if slow:
        said += f'; the reference elsewhere: {slow[0]} is replaced, wrapped, parametrized, hooked or of another type'
    return said


def _take_classes(model: nn.Module, modules: dict[str, nn.Module], fast_classes: tuple[type[Fast], ...]) -> None:
    if any(isinstance(module, Fast) and type(module) not in fast_classes for module in modules.values()):
        restore(model)  # it changes from operators to graphs, or back
    classes = {fast.reference: fast for fast in fast_classes}
    for module in modules.values():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
        forget_packed(module)


def _why_not_native(devices: set[str]) -> str | None:
    if MISSING is not None:
        return f'there are no native operators: {MISSING}'
    others = devices - {'cpu'}
    return f'the native operators are for CPUs, and the model is on {others.pop()}' if others else None


def _why_not_compiled(modules: dict[str, nn.Module]) -> str | None:
    networks = [module for module in modules.values() if isinstance(module, StripMLP)]
    if not networks:
        return 'only whole networks are compiled'
    if all(class_of(network) is not StripMLP for network in networks):  # of FSDP2, say
        return f'only StripMLP itself is compiled, and this is a {type(networks[0]).__name__}'
    layers = (layer for network in networks for layer in network.modules())
    if get_world_size() > 1 and any(isinstance(layer, nn.SyncBatchNorm) for layer in layers):
        return 'SyncBN is not compiled: it would wait for processes whose compiler fails'
    return _why_no_compiler()


def _why_no_compiler() -> str | None:
    if tuple(map(int, torch.__version__.split('.')[:2])) < COMPILES:
        return f'compiling takes PyTorch {".".join(map(str, COMPILES))}, and this is {torch.__version__}'
    return None


def _why_unknown() -> str | None:
    return f'this PyTorch, {torch.__version__}, has no {UNKNOWN[0]}' if UNKNOWN else None


def _why_not(modules: dict[str, nn.Module]) -> str | None:
    """Why nothing can run faster, or None."""
    if why := _why_unknown():
        return why
    for kind in {class_of(layer) for module in modules.values() for layer in module.modules()}:
        for name in ('__call__', '_call_impl', 'forward', '_conv_forward'):
            package = getattr(getattr(kind, name, None), '__globals__', {}).get('__name__', 'torch')
            if _is_known(kind.__module__) and not _is_known(package):
                return f'{kind.__name__}.{name} is patched, by {package}'
    return None


def _is_known(module: str) -> bool:
    return module.partition('.')[0] in AUTHORS


def _find_mismatch(name: str, block: nn.Module) -> str | None:
    """The first module or layer of a block that differs from what the network was built with, or None."""
    kinds = tuple(fast.reference for fast in CLASSES)
    for inner, module in block.named_modules(prefix=name):
        if isinstance(module, kinds):
            other = module.find_mismatch(module, _types()) if class_of(module) in kinds else ''
            if other is not None:
                layer = dict(module.named_modules()).get(other)
                return f'{f"{inner}.{other}".rstrip(".")} ({type(layer).__name__})'
    return None


def _types() -> Types:
    return tuple(filter(takes, (torch.float32, torch.bfloat16)))


def _what_runs() -> str:
    types = ' and '.join(str(dtype).removeprefix('torch.') for dtype in _types())
    return f'on native operators, {INSTRUCTIONS.get(extension.variant(), "")}{types}'
