"""Ask a GPU: does it work, is it right, how fast is it? Writes report.json and report.md.

Steps that have a result are not run again. The same command resumes a part that ran longer than its minutes."""

import argparse
import sys
from pathlib import Path

import torch

from .page import failures, fill_page, read_report, write_report
from .steps import PARTS, Setting, run_part


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--parts', nargs='+', choices=PARTS, default=['right', 'fast', 'many'], help='default: all but trained'
    )
    parser.add_argument('--steps', nargs='+', default=['*'], metavar='PATTERN', help='only these steps of the parts')
    parser.add_argument('--minutes', type=float, default=7, help='of each part in one call (default: %(default)s)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='default: %(default)s')
    parser.add_argument('--tiny', action='store_true', help='the smallest networks, to see that all steps run')
    parser.add_argument('--data-root', help='folder that holds caltech101/ (part trained)')
    parser.add_argument('--out', help='folder of the results (default: work_dirs/gpu/NAME_OF_THE_CARD)')
    parser.add_argument('--page', type=Path, help='fill the memory table of this page, such as docs/gpu.md')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('Error: --device cuda needs a GPU, and PyTorch sees none; --device cpu --tiny tries the steps')
    card = torch.cuda.get_device_name().lower().replace(' ', '-') if args.device == 'cuda' else 'cpu'
    out = args.out or f'work_dirs/gpu/{card}{"-tiny" * args.tiny}'
    setting = Setting(str(Path(out).absolute()), args.device, args.tiny, args.minutes, data_root=args.data_root)
    for part in args.parts:
        run_part(part, setting, args.steps)
        print(f'Report: {write_report(setting)[1]}', flush=True)  # after each, as the next one may be cut off
    if args.page:
        fill_page(args.page, read_report(setting))
    failed = failures(setting)
    if failed:
        sys.exit(f'Error: {len(failed)} steps have failed: {", ".join(failed)}; the report says why')


if __name__ == '__main__':
    main()
