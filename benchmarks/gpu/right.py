"""Part *right*: what a device computes is what float64 computes on the CPU, and trainings resume on it exactly."""

import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .. import ROOT
from . import checks, dense, trainings
from .checks import Case, small_case
from .parity import compare_outputs, load_reference, official_backbone, reference_images, stage_outputs
from .steps import NotRunError, Setting, Steps

ARCHS = ('tiny-light', 'tiny', 'small', 'base')
PARITY = ROOT / 'tests' / 'data' / 'parity'
DETECTORS = {
    'mask-rcnn': 'mask-rcnn_strip-mlp-tiny-light_fpn_1x_coco',
    'dino': 'dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco',
}
SEGMENTORS = {'upernet': 'strip-mlp-tiny-light_upernet_8xb2-160k_ade20k-512x512'}


def steps(setting: Setting) -> Steps:
    first = {'float32-bfloat16-float16-tiny-light': partial(variant, 'tiny-light')}
    others = {f'float32-bfloat16-float16-{arch}': partial(variant, arch) for arch in ARCHS[1:]}
    return {
        **first,
        'sizes': sizes,
        'forms': forms,
        'other-dtypes': other_dtypes,
        'parity': parity,
        'hooks-do-not-wait': hooks_do_not_wait,
        'cuda-graphs': cuda_graphs,
        **({} if setting.tiny else others),
        'compile-static': compile_static,
        'compile-dynamic': compile_dynamic,
        **{name: partial(dense.train_one_step, 'detection', config) for name, config in DETECTORS.items()},
        **{name: partial(dense.train_one_step, 'segmentation', config) for name, config in SEGMENTORS.items()},
        'resume-after-kill': resume_after_kill,
    }


def case_of(setting: Setting, arch: str = 'tiny-light', shape: tuple[int, int] | None = None) -> Case:
    return small_case(shape) if setting.tiny else Case(arch, shape=shape)


def backend_of(setting: Setting) -> str:
    """What compiles: the eager backend takes the graphs as they are, where the device is not the matter."""
    return 'inductor' if setting.cuda else 'eager'


def attempts(functions: dict[str, Callable[[], dict]]) -> dict:
    """Results by name; where some fail, all are tried before the first error is raised with the others' names."""
    found, failed = {}, {}
    for name, function in functions.items():
        try:
            found[name] = function()
        except checks.WrongResultError as error:
            failed[name] = str(error)
    if failed:
        raise checks.WrongResultError(
            '; '.join(f'{name}: {words}' for name, words in failed.items()) + f'; right: {found}'
        )
    return found


def variant(arch: str, setting: Setting) -> dict:
    """One architecture in training and inference, in each precision."""
    case = case_of(setting, arch)
    modes = {'training': True, 'inference': False}
    return attempts(
        {
            f'{dtype}, {mode}': partial(checks.precision, case, setting.device, dtype, train)
            for dtype in checks.TOLERANCES
            for mode, train in modes.items()
        }
    )


def sizes(setting: Setting) -> dict:
    """Images of other sizes than the network's own: smaller, larger, of odd sides."""
    side = 64 if setting.tiny else 224
    shapes = ((side // 2, side), (side + 41, 2 * side - 7), (2 * side, 3 * side // 2))
    return attempts(
        {
            f'{height}x{width}': partial(checks.precision, case_of(setting, shape=(height, width)), setting.device)
            for height, width in shapes
        }
    )


def forms(setting: Setting) -> dict:
    """Deploy form, checkpointing, memory in NHWC, and the modules as they are built."""
    run = partial(checks.errors_of, case_of(setting), setting.device)
    return attempts(
        {
            'deploy': partial(run, False, deploy=True),
            'checkpointing': partial(run, with_cp=True),
            'channels_last': partial(run, memory_format=torch.channels_last),
            'reference': partial(run, accelerated=False),
            'deploy, channels_last': partial(run, False, deploy=True, memory_format=torch.channels_last),
        }
    )


def other_dtypes(setting: Setting) -> dict:
    """Weights in other types."""
    case = case_of(setting)
    run = partial(checks.errors_of, case, setting.device)
    return attempts(
        {
            'float64': partial(run, True, checks.EXACT, weights=torch.float64),
            'bfloat16 weights': partial(run, False, checks.TOLERANCES['bfloat16'], weights=torch.bfloat16),
            'float16 weights': partial(run, False, checks.TOLERANCES['float16'], weights=torch.float16),
        }
    )


def parity(setting: Setting) -> dict:
    """The authors' outputs, of their classification code and of MLP-DINO."""
    files = sorted(PARITY.glob('*.json'))
    return {file.stem: _differences(file, setting) for file in (files[-2:-1] if setting.tiny else files)}


def _differences(file: Path, setting: Setting) -> dict[str, float]:
    reference = load_reference(file)
    with tempfile.TemporaryDirectory() as folder, checks.full_float32():
        backbone = official_backbone(reference, Path(folder)).to(setting.device)
        return compare_outputs(stage_outputs(backbone, reference_images(reference).to(setting.device)), reference)


def compile_static(setting: Setting) -> dict:
    case = checks.small_case(stages=1) if setting.tiny else case_of(setting)
    backend = backend_of(setting)
    return checks.errors_of(
        case,
        setting.device,
        accelerated=False,
        wrap=lambda model: torch.compile(model, backend=backend, dynamic=False),
    )


def compile_dynamic(setting: Setting) -> dict:
    """One graph for images of several sizes, of a small stage: compilers take minutes for all of a network's sizes."""
    cases = [checks.small_case(shape, stages=1) for shape in ((128, 128), (160, 192), (192, 96))]
    return checks.compiled_dynamic(cases, setting.device, backend_of(setting))


def cuda_graphs(setting: Setting) -> dict:
    if not setting.cuda:
        raise NotRunError('CUDA graphs need CUDA')
    return checks.graphed(case_of(setting), setting.device)


def hooks_do_not_wait(setting: Setting) -> dict:
    """A short training in which our hooks may not synchronise the device."""
    config = trainings.write_config(setting, 'hooks', iterations=6)
    runner = trainings.build(config, 'bfloat16')
    names = checks.guard_hooks(runner)
    runner.train()
    return dict(hooks=names, iterations=runner.iter)


def resume_after_kill(setting: Setting) -> dict:
    """A training that is killed after its first epoch and resumed ends with the bits of one that nobody disturbs."""
    config = trainings.write_config(setting, 'resume', iterations=4, epochs=3, deterministic=True)
    folder = config.parent
    undisturbed = trainings.train(config, folder / 'undisturbed')
    process = trainings.start(config, folder / 'killed')
    trainings.wait_for(folder / 'killed' / 'epoch_1.pth', process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = trainings.train(config, folder / 'killed')
    different = checks.same_checkpoints(undisturbed, resumed)
    if different:
        raise checks.WrongResultError(f'{len(different)} tensors differ after a resumption, first {different[:3]}')
    return dict(epochs=3, tensors=len(undisturbed['state_dict']), different=0)
