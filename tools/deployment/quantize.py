"""Quantize an exported file to int8, calibrated on training images of its config.

Compare both files with tools/test.py.

Example:
  python tools/deployment/quantize.py model.onnx CONFIG model_int8.onnx
"""

import argparse
import time

from mmstrip.deployment.formats import files_of
from mmstrip.deployment.quantization import calibration_pixels, quantize
from mmstrip.engine.launch import check_data
from mmstrip.utils.config import add_config_options, load_config
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', help='exported .onnx or .xml file with float32 weights')
    parser.add_argument('config', help='config file; its training images go through the test pipeline')
    parser.add_argument('out', help='file to write, in the same format')
    parser.add_argument('--images', type=int, default=300, help='number of calibration images (default: 300)')
    add_config_options(parser)
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'--images must be positive, but got {args.images}')
    return args


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    with short_errors():
        config = load_config(args.config, args.cfg_options)
        check_data(config, ['train_dataloader'])
        error = quantize(args.file, args.out, calibration_pixels(config, args.images))
    size = sum(file.stat().st_size for file in files_of(args.out)) / 1e6
    print(f'{args.out}: {size:.1f} MB in {time.perf_counter() - start:.0f} s')
    print(f'Root mean square difference on calibration images: {error:.1%}')


if __name__ == '__main__':
    main()
