"""Part *fast*: images/s, milliseconds and memory of the network beside its peers, and what their time goes to."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from mmstrip import accelerate, restore
from mmstrip.models.strip_mlp import StripMLPBlock

from ..speed.measuring import (
    Candidate,
    Settings,
    allow_tf32,
    copy_gigabytes,
    matmul_gflops,
    peak_memory,
    seconds_of,
    traffic,
)
from ..speed.profiling import costliest_operations, kernels_of
from ..speed.rounds import run_benchmark
from ..speed.specs import Spec
from .checks import SMALL_ARCH, Case, small_case
from .steps import NotRunError, Setting, Steps, takes_the_gpu

BFLOAT16, TF32 = 'bfloat16', 'float32'
# What the others are compared with comes first.
STRIP, STRIP_LIGHT = 'Strip-MLP-T', 'Strip-MLP-T*'
MODELS = {
    STRIP: Spec(STRIP, 'mmstrip.StripMLP', dict(arch='tiny')),
    'ConvNeXt-T': Spec('ConvNeXt-T', 'mmpretrain.ConvNeXt', dict(arch='tiny')),
    'Swin-T': Spec('Swin-T', 'mmpretrain.SwinTransformer', dict(arch='tiny')),
    'ResNet-50': Spec('ResNet-50', 'mmpretrain.ResNet', dict(depth=50)),
    STRIP_LIGHT: Spec(STRIP_LIGHT, 'mmstrip.StripMLP', dict(arch='tiny-light')),
    'Strip-MLP-S': Spec('Strip-MLP-S', 'mmstrip.StripMLP', dict(arch='small')),
    'Strip-MLP-B': Spec('Strip-MLP-B', 'mmstrip.StripMLP', dict(arch='base')),
}
TINY_MODELS = {
    STRIP: Spec(STRIP, 'mmstrip.StripMLP', dict(arch=SMALL_ARCH, img_size=64)),
    'ResNet-18': Spec('ResNet-18', 'mmpretrain.ResNet', dict(depth=18)),
}
TWO_LAYOUTS = ('ConvNeXt-T', 'ResNet-50', 'ResNet-18')  # of these it is not known which is the faster
DENSE = {'800x1216': ((800, 1216), 2), '512x512': ((512, 512), 8)}
BATCHES = (32, 64, 128, 256)


# Steps of one model: forms that it takes, mode, and images.
SINGLE = {
    'compiled-train': (('compile',), 'train', 64),
    'compiled-inference': (('compile',), 'inference', 128),
    'compiled-deploy': (('deploy', 'compile'), 'inference', 128),
    'compiled-one-image': (('compile', 'cudagraphs'), 'inference', 1),
    'graphs-train': (('cudagraphs',), 'train', 64),
    'graphs-inference': (('cudagraphs',), 'inference', 128),
    'graphs-one-image': (('cudagraphs',), 'inference', 1),
}


def steps(setting: Setting) -> Steps:
    names = list(models(setting))
    return {
        'limits': limits,
        'eager-train-bfloat16': partial(eager, ('train',), 64, BFLOAT16),
        'eager-inference-bfloat16-128': partial(eager, ('inference',), 128, BFLOAT16),
        'eager-inference-bfloat16-1': partial(eager, ('inference',), 1, BFLOAT16),
        'implementations': implementations,
        'kernels': kernels,
        **_singles(names[:4]),
        **{f'dense-{name}': partial(dense, name) for name in DENSE},
        'memory': memory,
        'eager-train-float32': partial(eager, ('train',), 64, TF32),
        'eager-inference-float32-128': partial(eager, ('inference',), 128, TF32),
        'eager-inference-float32-1': partial(eager, ('inference',), 1, TF32),
        **_singles(names[4:]),
    }


def _singles(names: Sequence[str]) -> Steps:
    return {
        f'{case}-{name}': partial(single, name, *settings)
        for name in names
        for case, settings in SINGLE.items()
        if 'deploy' not in case or name.startswith('Strip')
    }


def models(setting: Setting) -> dict[str, Spec]:
    return TINY_MODELS if setting.tiny else MODELS


def forms(spec: Spec, *names: str) -> Spec:
    """The same model in further forms."""
    return replace(spec, label=' '.join([spec.label, *(f'@{name}' for name in names)]), forms=(*spec.forms, *names))


def layouts(spec: Spec) -> list[Spec]:
    """A model in each layout that may be its best."""
    return [spec, forms(spec, 'channels_last')] if spec.label in TWO_LAYOUTS else [spec]


def settings_of(
    setting: Setting,
    modes: Sequence[str],
    batch: int,
    dtype: str = BFLOAT16,
    shape: tuple[int, int] = (224, 224),
) -> Settings:
    """Rounds that are long enough for a GPU's clock; the smallest ones for tiny networks. Float32 takes TF32."""
    allow_tf32(True)
    found = Settings(modes, batch, (shape,), dtype=dtype, device=setting.device, rounds=5, warmup=2, round_seconds=0.1)
    if setting.tiny:
        return replace(
            found, batch=min(batch, 2), shapes=((64, 64),), rounds=1, warmup=1, round_seconds=0.001, ceiling_side=64
        )
    return found


def measure(specs: Sequence[Spec], settings: Settings) -> dict:
    """A benchmark without what does not run here, which is named.

    Raises:
        RuntimeError: Nothing ran, or an error may have spoilt what ran after it.
    """
    report = run_benchmark(specs, settings, skip_failing=True)
    failed = report['failed']
    if not report['results'] or any(map(takes_the_gpu, failed.values())):
        raise RuntimeError('; '.join(f'{label}: {words}' for label, words in failed.items()))
    return report


def eager(modes: Sequence[str], batch: int, dtype: str, setting: Setting) -> dict:
    """All models as they are."""
    specs = [spec for one in models(setting).values() for spec in layouts(one)]
    if modes == ('inference',):
        specs.append(forms(models(setting)[STRIP], 'deploy'))
    return measure(specs, settings_of(setting, modes, batch, dtype))


def best_layout(spec: Spec) -> Spec:
    """Convolutional peers in NHWC, which GPUs' matrix units read."""
    return layouts(spec)[-1]


def single(name: str, own: Sequence[str], mode: str, batch: int, setting: Setting) -> dict:
    """One model, compiled or as CUDA graphs, alone, as a compiler takes minutes and may fail."""
    if not setting.cuda and 'cudagraphs' in own:
        raise NotRunError('CUDA graphs need CUDA')
    if not setting.cuda and name != STRIP:
        raise NotRunError('compilers are tried on one model where there is no GPU')
    spec = forms(best_layout(models(setting)[name]), *own)
    return measure([spec], settings_of(setting, (mode,), batch))


def dense(name: str, setting: Setting) -> dict:
    """All models at a detector's or segmentor's image size, all maps given."""
    shape, batch = DENSE[name]
    indices = dict(out_indices=(0, 1, 2, 3))
    specs = [replace(best_layout(one), arguments={**one.arguments, **indices}) for one in models(setting).values()]
    return measure(specs, settings_of(setting, ('inference', 'train'), batch, shape=shape))


def limits(setting: Setting) -> dict:
    """What the device can do, and the share of it that a training step of Strip-MLP-T takes."""
    device = setting.device
    side = 64 if setting.tiny else None
    products = _PRODUCTS[setting.cuda].items()
    rates = {name: max(_rate(name, tf32, device, side) for _ in range(3)) for name, tf32 in products}
    bandwidth = copy_gigabytes(device)
    found = dict(
        copy_gb_per_second=round(bandwidth, 1), matmul_gflops={name: round(rate) for name, rate in rates.items()}
    )
    settings = settings_of(setting, ('train', 'inference'), 64)
    for mode in settings.modes:
        candidate = Candidate(forms(models(setting)[STRIP], 'reference'), settings)
        step = candidate.step(mode, settings.shapes[0])
        step()
        seconds = min(seconds_of(step, device, 3) for _ in range(3))
        moved = traffic(step)
        work = 2 * candidate.complexity(settings.shapes[0]).flops * settings.batch * (3 if mode == 'train' else 1)
        found[mode] = dict(
            batch=settings.batch,
            ms=round(1e3 * seconds, 3),
            traffic_mib=round(moved / 2**20),
            of_bandwidth=round(moved / seconds / 1e9 / bandwidth, 3),
            of_products=round(work / seconds / 1e9 / rates['bfloat16'], 3),
        )
    return found


_PRODUCTS = {
    True: {'float32': False, 'TF32': True, 'bfloat16': True, 'float16': True},
    False: {'float32': False, 'bfloat16': False},
}


def _rate(name: str, tf32: bool, device: str, side: int | None) -> float:
    allow_tf32(tf32)
    return matmul_gflops('float32' if name == 'TF32' else name, device, side)


def kernels(setting: Setting) -> dict:
    """All kernels, and the ten costliest with operations by module, of a training step and of inference."""
    spec = models(setting)[STRIP]
    found = {}
    for mode, batch in (('train', 64), ('inference', 128)):
        settings = settings_of(setting, (mode,), batch)
        found[mode] = dict(
            batch=settings.batch,
            **kernels_of(Candidate(spec, settings), mode),
            operations=[
                dict(module=module, operation=operation, share=round(share, 4))
                for module, operation, share in costliest_operations(spec, settings, mode)
            ],
        )
    return found


def implementations(setting: Setting) -> dict:
    """A block of each stage as it is built, and accelerated: does it pay on this device?"""
    case = small_case() if setting.tiny else Case('tiny')
    batch = 2 if setting.tiny else 64
    backbone = case.build().to(setting.device).train()
    rows = []
    for stage, side in enumerate(case.side // (4 * 2**i) for i in range(4)):
        block = backbone.stages[stage][0]
        channels = backbone.embed_dims * 2**stage
        x = torch.randn(batch, channels, side, side, device=setting.device, requires_grad=True)
        x = x.to(memory_format=torch.channels_last)
        for name, change in dict(reference=restore, accelerated=accelerate).items():
            rows.append(dict(stage=stage + 1, implementation=name, **_block_cost(change(block), x, setting)))
    return dict(batch=batch, rows=rows)


def _block_cost(block: StripMLPBlock, x: torch.Tensor, setting: Setting) -> dict:
    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = block(x)
        y.float().mean().backward()

    for _ in range(1 if setting.tiny else 5):
        step()
    repeats, rounds = (1, 1) if setting.tiny else (20, 5)
    seconds = sorted(seconds_of(step, setting.device, repeats) for _ in range(rounds))
    return dict(ms=round(1e3 * seconds[rounds // 2], 4), peak_mib=round(peak_memory(step, setting.device) / 2**20, 2))


def memory(setting: Setting) -> dict:
    """Peak memory of a training step in bfloat16 by architecture, images and their size, with checkpointing too."""
    if not setting.cuda and not setting.tiny:
        raise NotRunError('memory of a card needs CUDA')
    cases = [((224, 224), batch) for batch in BATCHES] + [(shape, batch) for shape, batch in DENSE.values()]
    names = [name for name in models(setting) if name.startswith('Strip')]
    rows = []
    for name in names:
        for checkpointing in (False, True):
            spec = models(setting)[name]
            spec = replace(spec, arguments={**spec.arguments, 'with_cp': checkpointing, 'out_indices': (0, 1, 2, 3)})
            for shape, batch in cases[:1] if setting.tiny else cases:
                settings = settings_of(setting, ('train',), batch, shape=shape)
                row = dict(
                    model=name, checkpointing=checkpointing, shape=list(settings.shapes[0]), batch=settings.batch
                )
                rows.append(row | _peak(spec, settings))
    return dict(rows=rows)


def _peak(spec: Spec, settings: Settings) -> dict:
    """MiB beyond the weights, which are counted by themselves; too many images are no failure."""
    candidate = Candidate(spec, settings)
    weights = sum(value.nbytes for value in candidate.model.parameters()) / 2**20
    gc.collect()  # models before it are in cycles
    try:
        step: Callable = candidate.step('train', settings.shapes[0])
        step()
        peak = candidate.peak_mib('train', settings.shapes[0])
    except torch.OutOfMemoryError:
        peak = None
    return dict(peak_mib='too much' if peak is None else round(peak, 1), weights_mib=round(weights, 1))
