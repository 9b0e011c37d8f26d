"""Whole iterations of tools/train.py: network, loss, optimizer, hooks and logs of the ImageNet recipe, in bfloat16.

A batch in memory replaces the data loader.
"""

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from statistics import median

import torch
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmstrip.engine.launch import build_runner
from mmstrip.engine.precision import set_train_amp
from mmstrip.utils.config import load_config
from mmstrip.utils.wrappers import unwrap_model

from .. import CONFIGS
from ..speed.profiling import kernels_of

CONFIG = CONFIGS / 'strip_mlp' / 'strip-mlp-tiny_8xb128_in1k.py'
STRIP = 'Strip-MLP-T'
# Type, arguments, channels of the last map, and the memory format that is fastest.
NETWORKS = {
    STRIP: ('mmstrip.StripMLP', dict(arch='tiny'), 640, None),
    'ConvNeXt-T': ('mmpretrain.ConvNeXt', dict(arch='tiny', gap_before_final_norm=False), 768, torch.channels_last),
    'Swin-T': ('mmpretrain.SwinTransformer', dict(arch='tiny'), 768, None),
    'ResNet-50': ('mmpretrain.ResNet', dict(depth=50), 2048, torch.channels_last),
}
SMALL_ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1))  # runs in milliseconds
SMALL = dict.fromkeys(NETWORKS, ('mmpretrain.ResNet', dict(depth=18), 512, torch.channels_last))
SMALL[STRIP] = ('mmstrip.StripMLP', dict(arch=SMALL_ARCH, img_size=64), 128, None)
BATCH, WINDOWS, WINDOW = 64, 3, 10  # images; windows that are timed, and iterations in each


def build(name: str, how: str, dry: bool, batch: int, iterations: int, options: dict = {}) -> Runner:
    """The Runner that trains one of :data:`NETWORKS` for some iterations.

    Args:
        name, batch: The network, and images per iteration.
        how: 'eager'; 'compiled' by torch.compile, Strip-MLP block by block; 'accelerated', as in tools/train.py.
        dry: A smallest network and 64 x 64 pixels instead of 224 x 224.
        iterations: Of the only epoch.
        options: Dotted keys and values that override parts of the config.
    """
    from mmpretrain.structures import DataSample

    kind, arguments, channels, layout = (SMALL if dry else NETWORKS)[name]
    config = load_config(str(CONFIG))
    config.model.backbone = dict(arguments, type=kind)
    config.model.head.in_channels = channels
    config.work_dir = tempfile.mkdtemp()
    config.randomness, config.param_scheduler = dict(seed=0), config.param_scheduler[:1]
    config.train_cfg.update(max_epochs=1)
    for key in (f'{part}_{name}' for part in ('val', 'test') for name in ('cfg', 'dataloader', 'evaluator')):
        config[key] = None
    config.custom_hooks = []
    config.default_hooks.checkpoint = dict(type='CheckpointHook', interval=2, save_last=False)
    config.merge_from_dict(options)
    set_train_amp(config, 'bfloat16')
    runner = build_runner(config, accelerate=how == 'accelerated')
    draw, side = torch.Generator().manual_seed(0), 64 if dry else 224
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=draw)
    images = images.pin_memory() if torch.cuda.is_available() else images
    samples = [DataSample().set_gt_label(label) for label in torch.randint(0, 1000, (batch,), generator=draw)]
    runner._train_dataloader = DataLoader(  # models write to samples
        range(iterations), collate_fn=lambda _: dict(inputs=images, data_samples=deepcopy(samples))
    )
    model = unwrap_model(runner.model)
    if layout is not None:
        model.to(memory_format=layout)
    if how == 'compiled':
        parts = [block for stage in model.backbone.stages for block in stage] if name == STRIP else [model.backbone]
        for part in parts:
            part.compile()
    return runner


def run(runner: Runner, around: Callable[[int, Callable[[], None]], None]) -> None:
    """Train; ``around`` gets the number of each iteration and the iteration as a function."""
    loop = runner.train_loop
    iterate = loop.run_iter
    loop.run_iter = lambda index, data: around(index, lambda: iterate(index, data))
    runner.train()


def measure(name: str, how: str, dry: bool = False) -> list[dict]:
    """Time, peak memory and kernels of an iteration, see :func:`build`.

    Returns:
        One row: 'ms' of an iteration, the median of three windows of ten, with the 'fastest' and the 'slowest';
        'images_per_second'; 'peak_mib' on a GPU; 'start_s', seconds of the first window, in which compilers work;
        and of one iteration what :func:`benchmarks.speed.profiling.kernels_of` returns.
    """
    windows, window, batch = (1, 1, 2) if dry else (WINDOWS, WINDOW, BATCH)
    last = window * (1 + windows)
    marks, profiled = [], {}

    def around(index: int, run: Callable[[], None]) -> None:
        if index % window == 0:
            if not dry:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            marks.append(time.perf_counter())
        if index == last:
            profiled.update(kernels_of(run, 'cpu' if dry else 'cuda'))
        else:
            run()

    run(build(name, how, dry, batch, last + 1), around)
    start, *spent = (end - begin for begin, end in pairwise(marks))
    ms = [round(1e3 * seconds / window, 2) for seconds in sorted(spent)]
    found = dict(network=name, how=how, batch=batch, ms=median(ms), fastest=ms[0], slowest=ms[-1])
    found |= dict(images_per_second=round(1e3 * batch / median(ms), 1), start_s=round(start, 1))
    return [found | dict(peak_mib=None if dry else round(torch.cuda.max_memory_allocated() / 2**20)) | profiled]
