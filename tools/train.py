"""Train a classifier, detector or segmentor from its config.

Example:
  python tools/train.py configs/strip_mlp/strip-mlp-tiny-light_1xb64_digits-32px.py --amp auto
"""

import argparse
import os

from torch.distributed.elastic.multiprocessing.errors import record

from mmstrip.engine.launch import check_data, leave_group, parse_with_launcher, set_work_dir, train
from mmstrip.engine.precision import add_amp_option, set_train_amp
from mmstrip.utils.config import load_config, setting
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/NAME_OF_CONFIG)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from CHECKPOINT; without a path, or with "auto", from the newest one in the work dir',
    )
    add_amp_option(parser)
    parser.add_argument('--no-validate', action='store_true', help='skip validation during training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by total batch size / auto_scale_lr.base_batch_size',
    )
    return parse_with_launcher(parser)


def apply_args(config, args: argparse.Namespace) -> None:
    """Apply the command line to the config.

    Raises:
        FileNotFoundError: The checkpoint to resume from does not exist.
        ValueError: The config lacks what an option needs.
    """
    set_work_dir(config, args.work_dir, args.config)
    if args.resume == 'auto':
        config.resume = 'auto'
    elif args.resume:
        if not os.path.isfile(args.resume):
            raise FileNotFoundError(f'--resume: no checkpoint at {args.resume}')
        config.resume, config.load_from = True, args.resume
    set_train_amp(config, args.amp)
    if args.no_validate:
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
        (setting(config, 'default_hooks.checkpoint') or {}).pop('save_best', None)
    if args.auto_scale_lr:
        if setting(config, 'auto_scale_lr.base_batch_size') is None:
            raise ValueError(f'--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set')
        config.auto_scale_lr.enable = True


@record
def main() -> None:
    args = parse_args()
    with short_errors():
        config = load_config(args.config, args.cfg_options)
        apply_args(config, args)
        check_data(config, ['train_dataloader', 'val_dataloader'])
        train(config, args.launcher, args.trust_checkpoints, not args.no_accelerate)
    leave_group()


if __name__ == '__main__':
    main()
