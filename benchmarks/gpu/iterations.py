"""Whole iterations of tools/train.py: data, network, loss, optimizer, hooks and logs of the ImageNet recipe.

A batch in memory takes the loader's place. As a module it is what torchrun starts in each process of :func:`cards`.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.data import DataLoader

from mmstrip.engine.launch import build_runner
from mmstrip.engine.precision import set_train_amp
from mmstrip.utils.config import load_config
from mmstrip.utils.wrappers import unwrap_model

from .. import CONFIGS, ROOT
from ..results import write_json
from ..speed.profiling import kernels_of
from . import Setting

CONFIG = CONFIGS / 'strip_mlp' / 'strip-mlp-tiny_8xb128_in1k.py'
STRIP = 'Strip-MLP-T'
# Backbone, its channels and the layout that it is fastest in.
NETWORKS = {
    STRIP: (dict(type='mmstrip.StripMLP', arch='tiny'), 640, None),
    'ConvNeXt-T': (dict(type='ConvNeXt', arch='tiny', gap_before_final_norm=False), 768, torch.channels_last),
    'Swin-T': (dict(type='SwinTransformer', arch='tiny'), 768, None),
    'ResNet-50': (dict(type='ResNet', depth=50), 2048, torch.channels_last),
}
SMALL_ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1))  # runs in milliseconds
SMALL = {
    STRIP: (dict(type='mmstrip.StripMLP', arch=SMALL_ARCH, img_size=64), 128, None),
    **dict.fromkeys(('ConvNeXt-T', 'Swin-T', 'ResNet-50'), (dict(type='ResNet', depth=18), 512, torch.channels_last)),
}
WINDOWS, WINDOW = 3, 10  # iterations between two looks at the clock


def build(
    name: str, how: str, setting: Setting, batch: int, iterations: int, launcher: str = 'none', options: dict = {}
) -> Runner:
    """The Runner of one of :data:`NETWORKS` in the recipe of Strip-MLP-T, in bfloat16.

    Args:
        name, setting, batch: Of the network, the device and size, and images of each process.
        how: 'eager'; 'compiled' by torch.compile, Strip-MLP block by block; 'accelerated', as tools/train.py has it.
        iterations: Of the only epoch.
        launcher: See :func:`mmstrip.engine.launch.build_runner`.
        options: Dotted keys and values that override parts of the config.
    """
    from mmpretrain.structures import DataSample

    backbone, channels, layout = (SMALL if setting.tiny else NETWORKS)[name]
    config = load_config(str(CONFIG))
    config.model.backbone = dict(backbone)
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
    runner = build_runner(config, launcher, accelerate=how == 'accelerated')
    draw, side = torch.Generator().manual_seed(0), 64 if setting.tiny else 224
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=draw)
    images = images.pin_memory() if setting.cuda else images
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


def measure(name: str, how: str, setting: Setting, batch: int = 64, **options) -> dict:
    """Time, memory and kernels of an iteration.

    Returns:
        'ms' (median of three windows of ten iterations, the 'fastest' and 'slowest' beside it), 'images_per_second',
        'peak_mib', 'first_seconds' of the first iteration, in which compilers work, and of one iteration what
        :func:`benchmarks.speed.profiling.kernels_of` gives.
    """
    windows, window, batch = (1, 1, 2) if setting.tiny else (WINDOWS, WINDOW, batch)
    count = 2 + window * (1 + windows)
    runner = build(name, how, setting, batch, count, **options)
    found, marks = dict(batch=batch), []

    def around(index: int, run: Callable[[], None]) -> None:
        if index == count - 1:
            found.update(kernels_of(run, setting.cuda))
            return
        if index and index % window == 0:  # after the first, and the window that warms up
            marks.append(_now(setting))
        if setting.cuda and len(marks) == 1 and index == window:
            torch.cuda.reset_peak_memory_stats()
        before = time.perf_counter()
        run()
        if index == 0:
            found['first_seconds'] = round(_now(setting) - before, 1)

    run(runner, around)
    spent = sorted(1e3 * (end - begin) / window for begin, end in pairwise(marks))
    found |= dict(ms=round(median(spent), 2), fastest=round(spent[0], 2), slowest=round(spent[-1], 2))
    found['images_per_second'] = round(1e3 * batch * runner.world_size / found['ms'], 1)
    found['peak_mib'] = round(torch.cuda.max_memory_allocated() / 2**20) if setting.cuda else None
    return found


def _now(setting: Setting) -> float:
    """The time when all is done."""
    if setting.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def cards(setting: Setting, options: dict = {}) -> dict:
    """Iterations of Strip-MLP-T on all cards by DDP; without a card of two processes, which exchange by gloo."""
    count = torch.cuda.device_count() if setting.cuda else 2
    out = Path(setting.out) / 'cards.json'
    job = json.dumps(dict(out=str(out), setting=asdict(setting), options=options))
    command = [sys.executable, ROOT / 'tools' / 'torchrun.py', f'--nproc_per_node={count}']
    subprocess.run([*command, f'--master_port={get_free_port()}', '-m', __spec__.name, job], check=True)
    return dict(cards=count, **json.loads(out.read_text()))


if __name__ == '__main__':
    job = json.loads(sys.argv[1])
    found = measure(STRIP, 'accelerated', Setting(**job['setting']), launcher='pytorch', options=job['options'])
    if is_main_process():
        write_json(Path(job['out']), found)
    torch.distributed.destroy_process_group()
