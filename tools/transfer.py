"""Show transfer: train the digits classifier, then a detector and a segmentor on scenes of digits, from the classifier
and from scratch with the same budget and seed, and compare them in a table, curves and pictures."""

import argparse

from mmengine.config import DictAction

from mmstrip.analysis.transfer import BACKBONES, STARTS, TASKS, compare_transfer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/transfer', help='folder for results (default: %(default)s)')
    parser.add_argument(
        '--data', default='data/digit_scenes', help='folder of the scenes, made if missing (default: %(default)s)'
    )
    parser.add_argument(
        '--backbones',
        nargs='+',
        choices=BACKBONES,
        default=['strip-mlp-nano'],
        metavar='NAME',
        help=f'any of {", ".join(BACKBONES)} (default: the first)',
    )
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS), help='default: all')
    parser.add_argument('--starts', nargs='+', choices=STARTS, default=list(STARTS), help='default: both')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override parts of all configs'
    )
    args = parser.parse_args()
    compare_transfer(args.work_dir, args.data, args.backbones, args.tasks, args.starts, args.cfg_options)


if __name__ == '__main__':
    main()
