"""Write an exported file in int8, calibrated on training images of its config; tools/test.py tests both."""

import argparse
import sys
import time

from mmengine.config import DictAction

from mmstrip.deployment.formats import files_of
from mmstrip.deployment.quantization import calibration_pixels, quantize
from mmstrip.engine.launch import check_data
from mmstrip.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', help='file of tools/deployment/export.py, .onnx or .xml, with weights in float32')
    parser.add_argument('config', help='its config file: training images, read as in tests')
    parser.add_argument('out', help='file to write, of the same format')
    parser.add_argument('--images', type=int, default=300, help='how many images to calibrate on (default: 300)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override parts of the config'
    )
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'--images must be positive, but got {args.images}')
    return args


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    try:
        config = load_config(args.config, args.cfg_options)
        check_data(config, ['train_dataloader'])
        error = quantize(args.file, args.out, calibration_pixels(config, args.images))
    except (ImportError, OSError, ValueError) as reason:
        sys.exit(f'Error: {reason}')
    size = sum(file.stat().st_size for file in files_of(args.out)) / 1e6
    print(f'{args.out}: {size:.1f} MB in {time.perf_counter() - start:.0f} s')
    print(f'Its outputs of calibration images differ from those before by {error:.1%}, root mean square')


if __name__ == '__main__':
    main()
