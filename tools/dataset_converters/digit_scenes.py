"""Draw scenes of scikit-learn's handwritten digits, with COCO boxes and masks and with label maps for segmentation.

Example:
  python tools/dataset_converters/digit_scenes.py data/digit_scenes
"""

import argparse

from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', help='folder to write to')
    parser.add_argument('--train', type=int, default=1000, help='number of training scenes (default: 1000)')
    parser.add_argument('--val', type=int, default=200, help='number of validation scenes (default: 200)')
    parser.add_argument('--size', type=int, default=96, help='image size in pixels (default: 96)')
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: 0)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with short_errors():
        write_digit_scenes(args.out, args.train, args.val, args.size, args.seed)
    print(f'{args.out}: {args.train:,} training and {args.val:,} validation scenes')


if __name__ == '__main__':
    main()
