"""Ask a GPU, the most important first: is it right, how fast is it? Writes report.json, and pages on request.

Steps that have a result are not run again; the same command goes on where the minutes ended."""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch

from . import Setting
from .page import fill_measured, tables
from .runner import FAILED, STEPS, run_steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--steps', nargs='+', default=['*'], metavar='PATTERN', help='only these, or - to run none')
    parser.add_argument('--minutes', type=float, default=12, help='of all steps in one call (default: %(default)s)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='default: %(default)s')
    parser.add_argument('--tiny', action='store_true', help='the smallest networks, to see that all steps run')
    parser.add_argument('--out', help='folder of the results (default: work_dirs/gpu/CARD)')
    parser.add_argument(
        '--pages', nargs='*', type=Path, default=[], help='put the tables into these, such as docs/gpu.md README.md'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('Error: --device cuda needs a GPU, and PyTorch sees none; --device cpu --tiny tries the steps')
    card = torch.cuda.get_device_name().lower().replace(' ', '-') if args.device == 'cuda' else 'cpu'
    out = args.out or f'work_dirs/gpu/{card}{"-tiny" * args.tiny}'
    names = [name for name in STEPS if any(fnmatch(name, pattern) for pattern in args.steps)]
    report = run_steps(names, Setting(out, args.device, args.tiny), args.minutes)
    for name, table in tables(report).items():
        print(f'\n{name}\n\n{table}')
    for page in args.pages:
        try:
            fill_measured(page, report)
        except ValueError as error:
            sys.exit(f'Error: {error}')
    failed = [name for name in names if report['steps'].get(name, {}).get('state') == FAILED]
    if failed:
        sys.exit(f'Error: {len(failed)} steps have failed: {", ".join(failed)}; the logs in {out} say why')


if __name__ == '__main__':
    main()
