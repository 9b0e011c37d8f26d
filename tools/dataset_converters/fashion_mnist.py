"""Verify the four files of Fashion-MNIST and unpack them to where the configs look for them.

By default they come from the package dataset-fashion-mnist of Debian and Ubuntu.

Example:
  python tools/dataset_converters/fashion_mnist.py data/fashion_mnist --source ~/Downloads
"""

import argparse

from mmstrip.datasets.fashion_mnist import PACKAGE_FOLDER, unpack_fashion_mnist
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'out', nargs='?', default='data/fashion_mnist', help='folder to write to (default: %(default)s)'
    )
    parser.add_argument('--source', default=PACKAGE_FOLDER, help='folder of the four .gz files (default: %(default)s)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with short_errors():
        counts = unpack_fashion_mnist(args.source, args.out)
    print(f'{args.out}: {counts["train"]:,} training and {counts["t10k"]:,} test images')


if __name__ == '__main__':
    main()
