"""Write the 80 / 20 split of Caltech-101 (each class, seed 1024, without BACKGROUND_Google) to ROOT/meta."""

import argparse
import sys

from mmstrip.datasets.caltech101 import write_caltech101_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', help='folder that holds 101_ObjectCategories/')
    root = parser.parse_args().root
    try:
        meta = write_caltech101_split(root)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    for name in ('train', 'test', 'classes'):
        file = meta / f'{name}.txt'
        print(f'{file}: {len(file.read_text().splitlines()):,} lines')


if __name__ == '__main__':
    main()
