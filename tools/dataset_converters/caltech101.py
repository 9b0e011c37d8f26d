"""Write the 80 / 20 split of Caltech-101 (each class, seed 1024, without BACKGROUND_Google) to ROOT/meta."""

import argparse
import sys

from mmstrip.datasets.caltech101 import SPLITS, write_caltech101_split, write_smaller_copy


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', help='folder that holds 101_ObjectCategories/')
    parser.add_argument('--smaller-copy', metavar='DIR', help='write a copy with smaller images there, for 64 px')
    parser.add_argument(
        '--short-side', type=int, default=96, help='short side of its images in pixels (default: %(default)s)'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        meta = write_caltech101_split(args.root)
        if args.smaller_copy:
            meta = write_smaller_copy(args.root, args.smaller_copy, args.short_side)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    for name in (*SPLITS, 'classes'):
        file = meta / f'{name}.txt'
        print(f'{file}: {len(file.read_text().splitlines()):,} lines')


if __name__ == '__main__':
    main()
