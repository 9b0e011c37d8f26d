"""Test and time Strip-MLP on a GPU, the most important first. Results go to report.json.

The same command continues where the minutes ended: steps that are done are not run again."""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch

from mmstrip.utils.errors import short_errors

from .page import fill_measured, tables
from .runner import STEPS, errors_of, run_steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--steps', nargs='+', default=['*'], metavar='PATTERN', help="only these, such as 'right*'")
    parser.add_argument('--minutes', type=float, default=12, help='time for all steps (default: %(default)s)')
    parser.add_argument('--dry-run', action='store_true', help='run the steps on the CPU with the smallest networks')
    parser.add_argument('--out', type=Path, help='folder of the results (default: work_dirs/gpu/CARD)')
    parser.add_argument(
        '--pages', nargs='*', type=Path, default=[], help='write the tables into these, such as docs/gpu.md README.md'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit('Error: no GPU is available to PyTorch; --dry-run tries the steps on the CPU')
    card = 'dry-run' if args.dry_run else torch.cuda.get_device_name().lower().replace(' ', '-')
    names = [name for name in STEPS if any(fnmatch(name, pattern) for pattern in args.steps)]
    report = run_steps(names, args.out or Path('work_dirs/gpu') / card, args.minutes, args.dry_run)
    for kind, table in tables(report).items():
        print(f'\n{kind}\n\n{table}')
    with short_errors():
        for page in args.pages:
            fill_measured(page, report)
    failed = [name for name in names if name in report['steps'] and errors_of(report['steps'][name])]
    if failed:
        sys.exit(f'Error: {len(failed)} steps have failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
