"""Make scenes of scikit-learn's handwritten digits: COCO boxes and masks, and label maps for segmentation."""

import argparse
import sys

from mmstrip.datasets.digit_scenes import write_digit_scenes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', help='folder to write to')
    parser.add_argument('--train', type=int, default=1000, help='scenes to train on (default: 1000)')
    parser.add_argument('--val', type=int, default=200, help='scenes to validate on (default: 200)')
    parser.add_argument('--size', type=int, default=96, help='side in pixels (default: 96)')
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same scenes (default: 0)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        write_digit_scenes(args.out, args.train, args.val, args.size, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    print(f'{args.train} scenes to train on and {args.val} to validate on are in {args.out}')


if __name__ == '__main__':
    main()
