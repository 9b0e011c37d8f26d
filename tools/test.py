"""Test a classifier, detector or segmentor: print its metrics, save its predictions, draw them.

A file exported by tools/deployment/export.py is tested in its runtime.

Example:
  python tools/test.py CONFIG work_dirs/NAME/epoch_30.pth --show-dir pictures
"""

import argparse
import os
import tempfile
from pathlib import Path

from mmengine.config import ConfigDict
from torch.distributed.elastic.multiprocessing.errors import record

from mmstrip.deployment.formats import SUFFIXES
from mmstrip.deployment.testing import use_exported
from mmstrip.engine.launch import build_runner, check_data, leave_group, parse_with_launcher, set_work_dir
from mmstrip.engine.precision import add_amp_option, set_test_amp
from mmstrip.utils.config import leaf_datasets, load_config, name_of
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint or exported file')
    parser.add_argument('--work-dir', help='folder for logs (default: work_dirs/NAME_OF_CONFIG)')
    parser.add_argument('--out', metavar='FILE.pkl', help='save all predictions to this file')
    parser.add_argument('--show-dir', metavar='DIR', help='save pictures of the predictions to this folder')
    parser.add_argument('--interval', type=int, default=1, help='draw every n-th image (default: 1)')
    add_amp_option(parser)
    parser.add_argument(
        '--tta', action='store_true', help="use the config's test-time augmentation (detectors without: flipping)"
    )
    return parse_with_launcher(parser)


def apply_args(config, args: argparse.Namespace) -> None:
    """Apply the command line to the config.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        OSError: Results cannot be written to the folders of ``--out`` and ``--show-dir``.
        ValueError: ``--out`` does not name a pickle file, or the config lacks what an option needs.
    """
    set_work_dir(config, args.work_dir, args.config)
    if not os.path.isfile(args.checkpoint):
        raise FileNotFoundError(f'no checkpoint at {args.checkpoint}')
    if args.out:
        save_predictions(config, args.out)
    if args.show_dir:
        draw_predictions(config, args.show_dir, args.interval)
    if Path(args.checkpoint).suffix in SUFFIXES.values():
        if args.tta:
            raise ValueError('--tta needs a checkpoint; exported files are tested without augmentation')
        if args.launcher != 'none':
            raise ValueError(
                f'--launcher must be none for exported files, which are tested in one process, but got {args.launcher}'
            )
        return use_exported(config, args.checkpoint, args.amp, args.trust_checkpoints)
    config.load_from, config.resume = args.checkpoint, False
    set_test_amp(config, args.amp)
    if args.tta:
        augment_tests(config, args.config)


def save_predictions(config, path: str) -> None:
    if not path.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must end in .pkl or .pickle, but got {path!r}')
    if not config.get('test_evaluator'):
        raise ValueError('--out needs a test_evaluator, but the config has none')
    if os.path.isdir(path):
        raise ValueError(f'--out must be a file, but {path} is a folder')
    make_folder(os.path.dirname(path) or '.')
    evaluators = config.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
    config.test_evaluator = evaluators + [dict(type='DumpResults', out_file_path=path)]


def make_folder(path: str) -> None:
    """Make a folder for results, and try to write to it before anything is computed."""
    os.makedirs(path, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def draw_predictions(config, folder: str, interval: int) -> None:
    if not config.get('visualizer'):
        raise ValueError('--show-dir needs a visualizer, but the config has none')
    make_folder(folder)
    hook = dict(type='mmstrip.PredictionPicturesHook', out_dir=folder, interval=interval)
    config.custom_hooks = [*(config.get('custom_hooks') or []), hook]


def augment_tests(config, path: str) -> None:
    if config.get('default_scope') == 'mmdet':
        set_detection_tta(config)
    missing = [key for key in ('tta_model', 'tta_pipeline') if not config.get(key)]
    if missing:
        raise ValueError(f'--tta needs tta_model and tta_pipeline, but {path} has no {" and no ".join(missing)}')
    for _, dataset in leaf_datasets(config, 'test_dataloader.dataset'):
        dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)
    # Checkpoints store averaged weights as the model's, but EMAHook would look for the wrapper's.
    config.custom_hooks = [hook for hook in config.get('custom_hooks') or [] if not averages(hook)]
    defaults = config.get('default_hooks') or {}
    config.default_hooks = {key: hook for key, hook in defaults.items() if not averages(hook)}


def averages(hook) -> bool:
    return isinstance(hook, dict) and name_of(hook.get('type', '')).endswith('EMAHook')


def set_detection_tta(config) -> None:
    """Use the default of mmdet's own tool, as few of its configs have another: the image and its mirror image."""
    if config.model.get('roi_head', {}).get('mask_head'):
        raise ValueError('--tta: mmdet merges boxes only, but this model has a mask head')
    averaged = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    config.setdefault('tta_model', dict(type='DetTTAModel', tta_cfg=averaged))
    (_, dataset), *_ = leaf_datasets(config, 'test_dataloader.dataset')
    *loading, pack = dataset.pipeline
    # Unflipped first: mmdet's merged sample takes its ground truth, which PASCAL VOC metrics read, from the first view.
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    pack = dict(
        pack, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
    )
    config.setdefault('tta_pipeline', [*loading, dict(type='TestTimeAug', transforms=[flips, [pack]])])


@record
def main() -> None:
    args = parse_args()
    with short_errors():
        config = load_config(args.config, args.cfg_options)
        apply_args(config, args)
        check_data(config, ['test_dataloader'])
        build_runner(config, args.launcher, args.trust_checkpoints, not args.no_accelerate).test()
    leave_group()


if __name__ == '__main__':
    main()
