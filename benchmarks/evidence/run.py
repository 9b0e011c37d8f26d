"""Train and test a config, resume after interruptions, and write results and cost as JSON."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmstrip import ops
from mmstrip.analysis.complexity import analyze_complexity
from mmstrip.engine.hooks import PredictionPicturesHook
from mmstrip.engine.launch import build_runner, check_data
from mmstrip.engine.precision import set_train_amp
from mmstrip.utils.config import leaf_datasets, load_config
from mmstrip.utils.wrappers import unwrap_model

from .. import CONFIGS
from ..machine import cpu_name
from ..results import as_json, write_json
from .clock import ClockHook

PADDING = (1, 32, 128)  # pixels; sides are padded to multiples of these
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')

Metrics = dict[str, tuple[str, float]]
Results = dict[str, dict]


@dataclass(frozen=True)
class Run:
    """A training and its metrics.

    Attributes:
        part: Part of the evidence.
        name: Name of the run; its result is ``{part}/{name}.json``.
        config: Config file, relative to ``configs/``.
        metrics: Name of each metric in tables -> its name in the log and the value there that means 1.
        options: Dotted keys and values that override the config.
        seed: Defaults to 0.
        start: ``{part}/{name}`` of the run whose last checkpoint the backbone starts from; None: from scratch.
        choosing: Whether the run chooses settings: it never reads test images, and is judged by its last validation.
        image: Channels, height and width for counting params and FLOPs.
        waits: Whether its settings depend on runs that are not done yet.
        amp: Precision, see :func:`mmstrip.engine.precision.amp_dtype`; None: float32.
        threads: Number of cores.
    """

    part: str
    name: str
    config: str
    metrics: Metrics
    options: dict = field(default_factory=dict)
    seed: int = 0
    start: str | None = None
    choosing: bool = False
    image: tuple[int, int, int] = (3, 64, 64)
    waits: bool = False
    amp: str | None = None
    threads: int = 1

    @property
    def key(self) -> str:
        return f'{self.part}/{self.name}'

    @property
    def settings(self) -> dict:
        """What the result depends on, as JSON values."""
        return settings_of(as_json(asdict(self)))

    @property
    def command(self) -> str:
        """The command that reproduces the training."""
        settings = {**self.options, **_seed(self.seed)}
        options = ' '.join(f"'{key}={_option_value(value)}'" for key, value in settings.items())
        amp = f' --amp {self.amp}' if self.amp else ''
        return f'python tools/train.py configs/{self.config}{amp} --cfg-options {options}'


def settings_of(described: dict) -> dict:
    """What a run's result depends on, from the run as a dict."""
    names = ('config', 'options', 'seed', 'start', 'choosing', 'metrics')
    return {name: described[name] for name in names} | ({'amp': described['amp']} if described.get('amp') else {})


def is_done(run: Run, results: Results) -> bool:
    """Whether a run has a result with the same settings."""
    return run.key in results and results[run.key]['settings'] == run.settings


def read_results(folder: Path) -> Results:
    """Results by ``{part}/{name}``, from the JSON files of a folder."""
    return {str(file.relative_to(folder))[:-5]: json.loads(file.read_text()) for file in folder.glob('*/*.json')}


def _seed(seed: int) -> dict:
    return {'randomness.seed': seed}


def _option_value(value) -> str:
    return str(value).replace(' ', '').replace("'", '"')


def execute(run: Run, folder: Path, data_root: str, checkpoint: str | None = None) -> dict:
    """Train and test in ``folder``, resuming what is there, and write ``result.json``.

    Args:
        run: The run.
        folder: Work dir.
        data_root: Folder that replaces ``data/`` of the configs.
        checkpoint: Classifier that the backbone starts from; None: from scratch.

    Returns:
        'settings', 'command', the metrics, 'epochs', 'curve' (one dict per validation: 'epoch', 'minutes',
        'core_minutes', metrics), number of training 'images', 'minutes' and 'core_minutes' of training without
        validation, 'images_per_second' on one core, 'params', 'flops' (multiply-adds at ``run.image``), the machine,
        and for detectors and segmentors 'padding' of :func:`train_and_test`.

    Raises:
        FileNotFoundError: A folder of images is missing.
    """
    config = load_config(str(CONFIGS / run.config), {**run.options, **_seed(run.seed)})
    set_data_root(config, data_root)
    set_train_amp(config, run.amp)
    if checkpoint:
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
    if run.choosing:
        config.test_dataloader = config.test_cfg = config.test_evaluator = None
    check_data(config, [name for name in LOADERS if config.get(name)])
    params, flops = model_size(config, run.image)
    padding = config.default_scope != 'mmpretrain' and not run.choosing
    result = dict(settings=run.settings, command=run.command) | train_and_test(config, folder, run.metrics, 12, padding)
    result |= dict(params=params, flops=flops, image=list(run.image), machine=machine())
    write_json(folder / 'result.json', result)
    return result


def set_data_root(config: Config, data_root: str) -> None:
    """Replace ``data/`` by ``data_root`` in datasets and evaluators."""

    def placed(path):
        return os.path.join(data_root, path[5:]) if isinstance(path, str) and path.startswith('data/') else path

    for name in LOADERS:
        for _, dataset in leaf_datasets(config, f'{name}.dataset'):
            if 'data_root' in dataset:
                dataset.data_root = placed(dataset.data_root)
        evaluator = config.get(name.replace('dataloader', 'evaluator'))
        if isinstance(evaluator, dict) and 'ann_file' in evaluator:
            evaluator.ann_file = placed(evaluator.ann_file)


def model_size(config: Config, image: Sequence[int]) -> tuple[int, int]:
    """Number of parameters, and multiply-adds for one image."""
    init_default_scope(config.default_scope)
    with torch.no_grad():
        complexity = analyze_complexity(MODELS.build(config.model), tuple(image))
    return complexity.params, complexity.flops


def train_and_test(config: Config, folder: Path, metrics: Metrics, interval: int = 25, padding: bool = False) -> dict:
    """Train a config in ``folder``, resuming what is there, and test it once, or validate it without a test set.

    Args:
        config: A complete config.
        folder: Work dir; detectors and segmentors write some test images with truth and prediction to ``pictures/``.
        metrics: See :class:`Run`.
        interval: Draw every n-th test image. Defaults to 25.
        padding: Also validate a detector or segmentor with padded images at the end. Defaults to False.

    Returns:
        The metrics, 'epochs', 'curve', 'minutes', 'core_minutes' and 'images_per_second', see :func:`execute`; with
        ``padding``, 'padding': the metrics on validation images padded to multiples of :data:`PADDING` pixels, and
        'padding_ignored': the same with the backbone's ``ignore_padding``, if it has that argument.
    """
    config.work_dir = str(folder)
    config.resume = 'auto'
    runner = build_runner(config)
    runner.register_hook(ClockHook())
    if config.default_scope != 'mmpretrain':
        runner.register_hook(PredictionPicturesHook(str(folder / 'pictures'), interval))
    runner.train()
    clock = runner.message_hub.get_info('clock')
    if not clock['curve'] or clock['curve'][-1]['epoch'] < runner.epoch:
        runner.val()  # interrupted between its last checkpoint and its last validation
    final = runner.test() if config.get('test_cfg') is not None else clock['curve'][-1]
    curve = [_point(point, metrics) for point in clock['curve']]
    result = _values(final, metrics) | dict(epochs=runner.max_epochs, curve=curve) | _cost(clock)
    if padding:
        backbone = unwrap_model(runner.model).backbone
        validations = [('padding', False, PADDING)]
        if hasattr(backbone, 'ignore_padding'):
            validations.append(('padding_ignored', True, PADDING[1:]))
        for key, backbone.ignore_padding, divisors in validations:
            result[key] = {str(one): _values(_validate_padded(runner, one), metrics) for one in divisors}
    return result


def _validate_padded(runner: Runner, divisor: int) -> dict:
    """Metrics on validation images padded on the right and at the bottom to multiples of ``divisor``."""
    preprocessor = unwrap_model(runner.model).data_preprocessor
    if hasattr(preprocessor, 'test_cfg'):  # mmseg's
        preprocessor.test_cfg = dict(size_divisor=divisor)
    else:
        preprocessor.pad_size_divisor = divisor
    return runner.val_loop.run()


def _values(found: dict, metrics: Metrics) -> dict:
    return {name: round(float(found[key]) / unit, 5) for name, (key, unit) in metrics.items()}


def _point(point: dict, metrics: Metrics) -> dict:
    return dict(epoch=point['epoch']) | _minutes(point) | _values(point, metrics)


def _minutes(clock: dict) -> dict:
    return {name: round(clock[key] / 60, 4) for name, key in (('minutes', 'seconds'), ('core_minutes', 'core_seconds'))}


def _cost(clock: dict) -> dict:
    return dict(
        images=clock['images'],
        **_minutes(clock),
        images_per_second=round(clock['images'] / max(clock['core_seconds'], 1e-9), 1),
    )


def machine() -> dict:
    """The machine of a training, and its 15-minute load average at the end."""
    return dict(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[2], 1),
        torch=torch.__version__,
        operators=ops.status(),
        **(dict(gpu=torch.cuda.get_device_name()) if torch.cuda.is_available() else {}),
    )


def execute_described(folder: Path) -> None:
    """Execute the run in a folder's ``run.json``, which also holds the arguments of :func:`execute`."""
    described = json.loads((folder / 'run.json').read_text())
    options = described['run']['options']
    for key, value in options.items():
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            options[key] = tuple(value)  # JSON has no tuples, and mmseg's RandomCrop takes no list
    execute(Run(**described['run']), folder, described['data_root'], described['checkpoint'])


if __name__ == '__main__':
    execute_described(Path(sys.argv[1]))
