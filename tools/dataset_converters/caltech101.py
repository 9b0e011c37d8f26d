"""Write the 80 / 20 split of Caltech-101 (per class, seed 1024, without BACKGROUND_Google) to ROOT/meta.

Example:
  python tools/dataset_converters/caltech101.py data/caltech101 --smaller-copy data/caltech101_96px
"""

import argparse

from mmstrip.datasets.caltech101 import SPLITS, write_caltech101_split, write_smaller_copy
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', help='folder that contains 101_ObjectCategories/')
    parser.add_argument(
        '--smaller-copy', metavar='DIR', help='also write a copy with smaller images to this folder, for 64 px'
    )
    parser.add_argument(
        '--short-side', type=int, default=96, help='short side of the smaller images in pixels (default: %(default)s)'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with short_errors():
        meta = write_caltech101_split(args.root)
        if args.smaller_copy:
            meta = write_smaller_copy(args.root, args.smaller_copy, args.short_side)
    for name in (*SPLITS, 'classes'):
        file = meta / f'{name}.txt'
        print(f'{file}: {len(file.read_text().splitlines()):,} lines')


if __name__ == '__main__':
    main()
