"""Compare the speed and memory of models side by side: interleaved rounds, medians, one table.
Outputs are compared with those of the modules in float32.

A model is a config file or a registered backbone with arguments, followed by its forms:
  configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py
  mmstrip.StripMLP:arch=tiny@deploy
  ConvNeXt-T=mmpretrain.ConvNeXt:arch=tiny@openvino@bfloat16
"""

import argparse
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmstrip.utils.errors import short_errors

from .measuring import DTYPES, MODES, Settings, allow_tf32
from .profiling import costliest_operations
from .rounds import run_benchmark
from .specs import FORMS, Spec
from .tables import print_report, save_report


def parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    if not match:
        raise argparse.ArgumentTypeError(f'a shape is SIDE or HxW in pixels, such as 224 or 800x1216, but got {text!r}')
    return int(match[1]), int(match[2] or match[1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'models',
        nargs='+',
        metavar='MODEL',
        help=f'[LABEL=]SOURCE[:KEY=VALUE,...][@FORM...]; forms: {", ".join(FORMS)}',
    )
    parser.add_argument('--modes', nargs='+', choices=MODES, default=['inference'])
    parser.add_argument('--batch', type=int, default=8, help='images per step (default: 8)')
    parser.add_argument(
        '--shapes', type=parse_shape, nargs='+', default=[(224, 224)], metavar='HxW', help='(default: 224)'
    )
    parser.add_argument('--channels', type=int, default=3, help='image channels (default: 3)')
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default='float32',
        help='for models whose form names none (default: float32); half precision runs under autocast or in OpenVINO',
    )
    parser.add_argument('--tf32', action='store_true', help='allow TF32 in float32 products on CUDA')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument('--rounds', type=int, default=10, help='timed rounds (default: 10)')
    parser.add_argument('--warmup', type=int, default=2, help='rounds before the timed ones (default: 2)')
    parser.add_argument('--out', type=Path, metavar='DIR', help='save benchmark.json and plots in this folder')
    parser.add_argument(
        '--profile', action='store_true', help='list the ten costliest operations of each model instead'
    )
    return parser.parse_args()


def show_profile(spec: Spec, settings: Settings) -> None:
    for mode in settings.modes:
        table = Table('module', 'operation', 'share', title=f'{spec.label}, {mode}')
        for module, operation, share in costliest_operations(spec, settings, mode):
            table.add_row(module, operation, f'{share:.1%}')
        Console(width=160).print(table)


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    allow_tf32(args.tf32)
    names = ('modes', 'batch', 'shapes', 'channels', 'dtype', 'device', 'rounds', 'warmup')
    settings = Settings(**{name: getattr(args, name) for name in names})
    with short_errors():
        specs = [Spec.parse(text) for text in args.models]
        if args.profile:
            for spec in specs:
                show_profile(spec, settings)
            return
        report = run_benchmark(specs, settings)
        print_report(report)
        if args.out:
            save_report(report, args.out)
            print(f'Saved in {args.out}')


if __name__ == '__main__':
    main()
