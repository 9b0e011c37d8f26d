"""The runs of the evidence: trainings on public images that test the paper's claims (`make evidence`)."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from .run import Metrics, Results, Run, is_done

TOP1: Metrics = {'top-1': ('accuracy/top1', 100)}
RATES = (5e-4, 1e-3)
SEEDS = (0, 1, 2)
RATE = 'optim_wrapper.optimizer.lr'
EPOCHS = 'train_cfg.max_epochs'
BACKBONE = 'model.backbone'

# Config of each model on Caltech-101.
CALTECH101 = {
    'strip-mlp-tiny-light': 'strip_mlp/strip-mlp-tiny-light_1xb32_caltech101-64px.py',
    'resnet18': 'comparison/resnet18_1xb32_caltech101-64px.py',
    'resnet50': 'comparison/resnet50_1xb32_caltech101-64px.py',
    'convnext-tiny': 'comparison/convnext-tiny_1xb32_caltech101-64px.py',
    'swin-tiny': 'comparison/swin-tiny_1xb32_caltech101-64px.py',
}
LIKELY_BEST = ('strip-mlp-tiny-light', 'resnet50')
CALTECH101_EPOCHS, CHOOSING_EPOCHS = 12, 3

# Network on Fashion-MNIST -> image side, learning rate, epochs of the full run (1: only tried), precision and threads.
FASHION_MNIST = {
    'strip-mlp-tiny-light': (32, 1e-3, 1, {}),
    'strip-mlp-nano': (64, 1e-3, 20, {}),
    'strip-mlp-pico': (128, 2e-3, 32, dict(amp='bfloat16', threads=2)),
}
FASHION_MNIST_CHOOSING_EPOCHS = 1

ABLATIONS = 'strip_mlp/strip-mlp-pico_1xb128_cifar10-64px.py'
ABLATIONS_EPOCHS, ABLATIONS_CHOOSING_EPOCHS = 5, 1
ABLATIONS_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ABLATIONS_SEEDS = tuple(range(6))
# Variant -> arguments of the backbone. First the shared network, then its variants, most important first; the first two
# with the first three seeds are the pilot.
VARIANTS = {
    'shared': {},
    'channel-patches-1': {'num_patches': 1},
    'branches-lsmm': {'branches': ['lsmm']},
    'branches-cgsmm': {'branches': ['cgsmm']},
    'rows-and-columns-parallel': {'cascade': False},
    'strip-width-1': {'strip_width': 1},
    'strip-width-7': {'strip_width': 7},
}
# The pilot's two networks at twice the resolution.
ABLATIONS_LARGE_SIDE, ABLATIONS_LARGE_SEEDS = 128, (0, 1)
ABLATIONS_LARGE = {f'{BACKBONE}.img_size': ABLATIONS_LARGE_SIDE} | {
    f'{loader}_dataloader.dataset.pipeline.{step}.scale': ABLATIONS_LARGE_SIDE
    for loader, step in (('train', 3), ('val', 1), ('test', 1))
}


class Task(NamedTuple):
    """A detector or segmentor of part 4.

    Attributes:
        epochs: Epochs of a full run.
        choosing_epochs: Epochs of a run that chooses the learning rate.
        image: Channels, height and width for counting multiply-adds.
        metrics: See :class:`Run`, main metric first.
        models: Backbone -> its config.
    """

    epochs: int
    choosing_epochs: int
    image: tuple[int, int, int]
    metrics: Metrics
    models: dict[str, str]


TRANSFER = {
    'bccd': Task(
        epochs=12,
        choosing_epochs=3,
        image=(3, 240, 320),
        metrics={'AP50': ('pascal_voc/mAP', 1)},
        models={
            'strip-mlp-tiny-light': 'detection/retinanet_strip-mlp-tiny-light_fpn_1xb8_bccd.py',
            'resnet18': 'comparison/retinanet_resnet18_fpn_1xb8_bccd.py',
        },
    ),
    'camvid': Task(
        epochs=16,
        choosing_epochs=2,
        image=(3, 180, 240),
        metrics={'mIoU': ('mIoU', 100)},
        models={
            'strip-mlp-tiny-light': 'segmentation/strip-mlp-tiny-light_fpn_1xb4_camvid.py',
            'resnet18': 'comparison/resnet18_fpn_1xb4_camvid.py',
        },
    ),
}

# Recipes of CamVid -> options, in the order in which they were tried; the last is the configs'.
_CROPS = {'train_dataloader.dataset.pipeline.3.crop_size': (176, 240), 'model.data_preprocessor.size': (176, 240)}
_WEIGHTS = 'model.decode_head.loss_decode.class_weight'
_MEDIAN_FREQUENCY = [0.279, 0.202, 4.787, 0.149, 1.0, 0.422, 3.847, 1.974, 0.789, 6.375, 8.859]
CAMVID_RECIPES = {
    'no-weights-crops-240x176': {**_CROPS, _WEIGHTS: None},
    'median-frequency-crops-240x176': {**_CROPS, _WEIGHTS: _MEDIAN_FREQUENCY},
    'root-of-median-frequency-crops-256x192': {},
}
CAMVID_CHOOSING_EPOCHS = 8

CIFAR10 = 'strip_mlp/strip-mlp-tiny-light_caltech101-pre_1xb64_cifar10-64px.py'

DIGIT_SCENES = 'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py'
# Change that was tried to find out why the segmentor of digit scenes is poor -> options.
DIGIT_SCENES_TRIALS = {
    'as-it-is': {},
    'four-times-the-epochs': {EPOCHS: 20, 'param_scheduler.1.end': 20},
    'three-times-the-rate': {RATE: 3e-3},
    'both-of-these': {EPOCHS: 20, 'param_scheduler.1.end': 20, RATE: 3e-3},
    'backbone-at-the-heads-rate': {'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult': 1.0},
    'no-norm-in-the-neck': {'model.neck.norm_cfg': None},
    'windows-of-the-whole-map': {f'{BACKBONE}.img_size': 96},
    'background-at-full-weight': {'model.decode_head.loss_decode.class_weight': None},
}


def caltech101(results: Results) -> list[Run]:
    """Part 1: Strip-MLP-T* and its peers from scratch; for each, short runs that choose the rate, then seed 0."""
    return [run for runs in caltech101_runs(results) for run in runs]


def caltech101_seeds(results: Results) -> list[Run]:
    """Part 1: further seeds of the two models that are best on the held-out images."""
    first = [runs[-1] for runs in caltech101_runs(results)]
    best = best_models(first, results, 2)
    places = best or LIKELY_BEST  # until they are known, for the time estimate
    chosen = [run for run in first if run.name.rpartition('_')[0] in places]
    return [
        replace(run, name=f'{run.name[:-1]}{seed}', seed=seed, waits=run.waits or not best)
        for seed in SEEDS[1:]
        for run in chosen
    ]


def caltech101_runs(results: Results) -> list[list[Run]]:
    """For each model, the runs that choose its learning rate, then seed 0."""
    models = []
    for model, config in CALTECH101.items():
        run = Run('caltech101', f'{model}_seed0', config, TOP1, {EPOCHS: CALTECH101_EPOCHS})
        choosing = rate_runs(run, model, RATES, CHOOSING_EPOCHS)
        models.append([*choosing, with_best_rate(run, choosing, results)])
    return models


def fashion_mnist(results: Results) -> list[Run]:
    """Part 2, easy to reproduce: networks and image sizes tried for one epoch, then full runs of the small ones."""
    runs = []
    for model, (side, rate, epochs, how) in FASHION_MNIST.items():
        config = f'strip_mlp/{model}_1xb64_fashion-mnist-{side}px.py'
        options = {EPOCHS: epochs, RATE: rate}
        run = Run('fashion-mnist', f'{model}_seed0', config, TOP1, options, image=(3, side, side), **how)
        choosing = rate_runs(run, model, [rate], FASHION_MNIST_CHOOSING_EPOCHS)
        runs += choosing
        if epochs > FASHION_MNIST_CHOOSING_EPOCHS:
            runs.append(with_best_rate(run, choosing, results))
    return runs


def ablations(results: Results) -> list[Run]:
    """Part 3: ablations of the paper's Tables 6 to 9, six seeds each, at the learning rate of the shared network."""
    choosing, rated = ablation_network(results)
    shared, first, *others = VARIANTS
    order = [(variant, seed) for seed in ABLATIONS_SEEDS for variant in (shared, first)]
    order += [(variant, seed) for variant in others for seed in ABLATIONS_SEEDS]
    return choosing + [ablation(rated, variant, seed) for variant, seed in order]


def ablations_large(results: Results) -> list[Run]:
    """Part 3: the pilot's two networks at twice the resolution, at the learning rate chosen for half of it."""
    _, rated = ablation_network(results)
    side = ABLATIONS_LARGE_SIDE
    large = replace(rated, part='ablations-128px', options={**rated.options, **ABLATIONS_LARGE}, image=(3, side, side))
    return [ablation(large, variant, seed) for seed in ABLATIONS_LARGE_SEEDS for variant in list(VARIANTS)[:2]]


def ablation_network(results: Results) -> tuple[list[Run], Run]:
    """The runs that choose the learning rate of the shared network, and a run with it."""
    run = Run('ablations', '', ABLATIONS, TOP1, {EPOCHS: ABLATIONS_EPOCHS}, amp='bfloat16')
    choosing = rate_runs(run, 'pico', ABLATIONS_RATES, ABLATIONS_CHOOSING_EPOCHS)
    return choosing, with_best_rate(run, choosing, results)


def ablation(run: Run, variant: str, seed: int) -> Run:
    """A run of one variant of the shared network."""
    changes = {f'{BACKBONE}.{key}': value for key, value in VARIANTS[variant].items()}
    return replace(run, name=f'{variant}_seed{seed}', seed=seed, options={**run.options, **changes})


def transfer(results: Results) -> list[Run]:
    """Part 4: a detector and a segmentor, each from its backbone's classifier of part 1 and from scratch."""
    runs = []
    for key, task in TRANSFER.items():
        for model, config in task.models.items():
            for start in ('classifier', 'scratch'):
                name = transfer_name(key, model, start)
                options = {EPOCHS: task.epochs} | ({f'{BACKBONE}.init_cfg': None} if start == 'scratch' else {})
                run = Run('transfer', name, config, task.metrics, options, image=task.image)
                if start == 'classifier':
                    run = replace(run, start=f'caltech101/{model}_seed0')
                choosing = rate_runs(run, name, RATES, task.choosing_epochs)
                runs += [*choosing, with_best_rate(run, choosing, results)]
    return runs


def transfer_name(task: str, model: str, start: str) -> str:
    """Name of a run of part 4 in file names."""
    return f'{task}_{model}_from-{start}'


def camvid_recipes(results: Results) -> list[Run]:
    """Part 4: recipes for Strip-MLP-T* on CamVid, from scratch for half of the epochs, judged on the validation set."""
    task = TRANSFER['camvid']
    model = next(iter(task.models))
    shared = {EPOCHS: CAMVID_CHOOSING_EPOCHS, RATE: max(RATES), f'{BACKBONE}.init_cfg': None}
    run = Run('camvid-recipes', '', task.models[model], task.metrics, choosing=True, image=task.image)
    return [replace(run, name=f'{recipe}_{model}', options=shared | own) for recipe, own in CAMVID_RECIPES.items()]


def cifar10(results: Results) -> list[Run]:
    """Part 4: a classifier of CIFAR-10 as JPEG, from that of Caltech-101 and from scratch.

    Both use the learning rate chosen on Caltech-101.
    """
    caltech101_rate = caltech101_runs(results)[0][-1].options.get(RATE)
    options = {EPOCHS: 2, RATE: caltech101_rate}
    run = Run('cifar10', 'from-classifier', CIFAR10, TOP1, options, waits=caltech101_rate is None)
    scratch = replace(run, name='from-scratch', options={**options, f'{BACKBONE}.init_cfg': None})
    return [replace(run, start='caltech101/strip-mlp-tiny-light_seed0'), scratch]


def digit_scenes(results: Results) -> list[Run]:
    """Part 4: a segmentor of digit scenes from scratch, with one thing changed in each run."""
    run = Run('digit-scenes', '', DIGIT_SCENES, {'mIoU': ('mIoU', 100)}, choosing=True, image=(3, 96, 96))
    return [replace(run, name=name, options={EPOCHS: 5, **options}) for name, options in DIGIT_SCENES_TRIALS.items()]


def rate_runs(run: Run, name: str, rates: Iterable[float], epochs: int) -> list[Run]:
    """Short runs that choose the learning rate of a full run."""
    return [
        replace(
            run, choosing=True, name=f'choose_{name}_lr{rate:g}', options={**run.options, EPOCHS: epochs, RATE: rate}
        )
        for rate in rates
    ]


def with_best_rate(run: Run, choosing: list[Run], results: Results) -> Run:
    """A run with the settings of the best short run; it waits until all of these are done."""
    if not all(is_done(run, results) for run in choosing):
        return replace(run, waits=True)
    best = max(choosing, key=lambda one: results[one.key][next(iter(one.metrics))])
    return replace(run, config=best.config, image=best.image, options={**best.options, EPOCHS: run.options[EPOCHS]})


def best_models(runs: list[Run], results: Results, count: int) -> set[str] | None:
    """The best models by their last validation on held-out images; None while a result is missing."""
    if not all(is_done(run, results) for run in runs):
        return None
    metric = next(iter(runs[0].metrics))
    order = sorted(runs, key=lambda run: results[run.key]['curve'][-1][metric], reverse=True)
    return {run.name.rpartition('_')[0] for run in order[:count]}


# Most important first.
PLAN: list[tuple[str, Callable[[Results], list[Run]]]] = [
    ('caltech101', caltech101),
    ('fashion-mnist', fashion_mnist),
    ('caltech101', caltech101_seeds),
    ('ablations', ablations),
    ('ablations-128px', ablations_large),
    ('camvid-recipes', camvid_recipes),
    ('transfer', transfer),
    ('cifar10', cifar10),
    ('digit-scenes', digit_scenes),
]
PARTS = tuple(dict.fromkeys(part for part, _ in PLAN))


def planned_runs(parts: Collection[str], results: Results) -> list[Run]:
    """All runs of some parts, in order; some settings depend on the results of other runs.

    Args:
        parts: Names from ``PARTS``.
        results: See :func:`read_results`.
    """
    return [run for part, runs in PLAN if part in parts for run in runs(results)]
