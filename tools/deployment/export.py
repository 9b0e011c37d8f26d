"""Export a trained classifier, segmentor or detector, or its backbone, and compare its outputs with PyTorch's.

Example:
  python tools/deployment/export.py CONFIG work_dirs/NAME/epoch_30.pth model.onnx --dynamic-batch
"""

import argparse
import time

from mmstrip.deployment import Export, export_model
from mmstrip.deployment.formats import SUFFIXES, files_of
from mmstrip.utils.checkpoints import add_trust_option
from mmstrip.utils.config import add_config_options
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint of the trained model')
    parser.add_argument('out', help=f'file to write, named after its format: *{", *".join(SUFFIXES.values())}')
    parser.add_argument('--format', choices=SUFFIXES, default='onnx', help='format of the file (default: onnx)')
    part = parser.add_mutually_exclusive_group()
    part.add_argument('--features', action='store_true', help='export the feature maps of the backbone')
    part.add_argument('--neck', action='store_true', help='export the feature maps of the neck')
    parser.add_argument('--scores', action='store_true', help="export a classifier's scores instead of logits")
    parser.add_argument(
        '--shape', type=int, nargs='+', metavar=('H', 'W'), help="image size (default: the test pipeline's, else 224)"
    )
    parser.add_argument('--dynamic-batch', action='store_true', help='accept any number of images (default: one)')
    parser.add_argument('--dynamic-size', action='store_true', help='accept images of any size')
    parser.add_argument('--opset', type=int, help="ONNX opset version (default: PyTorch's choice)")
    parser.add_argument(
        '--half', action='store_true', help='store weights in float16, for half the file size (ONNX and OpenVINO)'
    )
    parser.add_argument(
        '--normalize', action='store_true', help='accept uint8 pixels in BGR and normalize them in the graph'
    )
    add_config_options(parser)
    add_trust_option(parser)
    args = parser.parse_args()
    if args.shape and len(args.shape) > 2:
        parser.error(f'--shape takes one side or H W, but got {" ".join(map(str, args.shape))}')
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
    print(f'Exporting to {args.out} ...', flush=True)
    with short_errors():
        error = export_model(args.config, args.checkpoint, args.out, settings, args.cfg_options, args.trust_checkpoints)
    size = sum(file.stat().st_size for file in files_of(args.out)) / 1e6
    print(f'{args.out}: {size:.1f} MB in {time.perf_counter() - start:.0f} s')
    if error is None:
        print('Nothing was compared: neither the file nor PyTorch detects anything in random images')
        return
    print(f'Largest difference from PyTorch: {error:.1e} of the largest output')


if __name__ == '__main__':
    main()
