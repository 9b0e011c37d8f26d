"""Put Fashion-MNIST where the configs look for it: the four files of Debian's and Ubuntu's package
dataset-fashion-mnist, or those in a folder, are checked and unpacked to OUT."""

import argparse
import sys

from mmstrip.datasets.fashion_mnist import PACKAGE_FOLDER, unpack_fashion_mnist


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'out', nargs='?', default='data/fashion_mnist', help='folder to write to (default: %(default)s)'
    )
    parser.add_argument(
        '--source', default=PACKAGE_FOLDER, help="folder of the four .gz files (default: the package's, %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        counts = unpack_fashion_mnist(args.source, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    print(f'{counts["train"]:,} images to train on and {counts["t10k"]:,} to test on are in {args.out}')


if __name__ == '__main__':
    main()
