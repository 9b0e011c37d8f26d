"""Export a trained classifier, segmentor or detector, or its backbone, for a runtime, and compare it with PyTorch."""

import argparse
import sys
import time

from mmengine.config import DictAction

from mmstrip.deployment import Export, export_model
from mmstrip.deployment.formats import SUFFIXES, files_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help=f'file to write, which ends in {", ".join(SUFFIXES.values())}, by its format')
    parser.add_argument('--format', choices=SUFFIXES, default='onnx', help='(default: onnx)')
    part = parser.add_mutually_exclusive_group()
    part.add_argument('--features', action='store_true', help='the maps of the backbone alone')
    part.add_argument('--neck', action='store_true', help='the maps of backbone and neck')
    parser.add_argument('--scores', action='store_true', help="a classifier's scores instead of logits")
    parser.add_argument(
        '--shape', type=int, nargs='+', metavar=('H', 'W'), help="image size (default: the test pipeline's, else 224)"
    )
    parser.add_argument('--dynamic-batch', action='store_true', help='take any number of images (default: one)')
    parser.add_argument('--dynamic-size', action='store_true', help='take images of any size')
    parser.add_argument('--opset', type=int, help="version of ONNX's operators (default: PyTorch's choice)")
    parser.add_argument('--half', action='store_true', help='weights in float16, half the file: ONNX and OpenVINO')
    parser.add_argument('--normalize', action='store_true', help='take pixels, BGR in uint8, and normalize them')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override parts of the config'
    )
    parser.add_argument('--trust-checkpoints', action='store_true', help='run the code that CHECKPOINT may ask for')
    args = parser.parse_args()
    if args.shape and len(args.shape) > 2:
        parser.error(f'--shape takes one side or H W, but got {args.shape}')
    return args


def main() -> None:
    args = parse_args()
    names = ('format', 'dynamic_batch', 'dynamic_size', 'opset', 'half', 'normalize', 'scores')
    settings = Export(
        **{name: getattr(args, name) for name in names},
        part='backbone' if args.features else 'neck' if args.neck else 'whole',
        shape=(args.shape[0], args.shape[-1]) if args.shape else None,
    )
    start = time.perf_counter()
    try:
        error = export_model(args.config, args.checkpoint, args.out, settings, args.cfg_options, args.trust_checkpoints)
    except (ImportError, OSError, ValueError) as reason:
        sys.exit(f'Error: {reason}')
    size = sum(file.stat().st_size for file in files_of(args.out)) / 1e6
    print(f'{args.out}: {size:.1f} MB in {time.perf_counter() - start:.0f} s')
    if error is None:
        print('Nothing was compared: neither it nor PyTorch finds anything in random pictures')
        return
    print(f'Its outputs differ from those of PyTorch by {error:.1e} at most, relative to the largest')


if __name__ == '__main__':
    main()
