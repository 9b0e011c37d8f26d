"""Effective receptive fields of backbones side by side: how much each pixel counts in the central feature of a stage.

CONFIG is a config file of any toolbox or a registered backbone with its arguments, with a label if wanted:
  configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py
  ResNet-50=mmpretrain.ResNet:depth=50
CHECKPOINT fills the backbone; `none` leaves it random. IMAGES is an image file or a folder.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from mmstrip.analysis.receptive_field import SHARES, compare_fields, find_images, load_subject, read_images


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s CONFIG CHECKPOINT [CONFIG CHECKPOINT ...] IMAGES [options]',
    )
    parser.add_argument('items', nargs='+', metavar='CONFIG CHECKPOINT ... IMAGES', help=argparse.SUPPRESS)
    parser.add_argument('--size', type=int, default=224, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--stage', type=int, help="index of the stage, from 0 (default: the config's last)")
    parser.add_argument('--num-images', type=int, default=50, help='images to average over (default: %(default)s)')
    parser.add_argument('--out', default='work_dirs/receptive_field', help='folder for results (default: %(default)s)')
    parser.add_argument('--trust-checkpoints', action='store_true', help='run the code that checkpoints may ask for')
    args = parser.parse_args()
    if len(args.items) < 3 or len(args.items) % 2 == 0:
        parser.error(f'give pairs of CONFIG and CHECKPOINT (or none), then IMAGES, but got {len(args.items)} arguments')
    if args.size < 32 or args.num_images < 1:
        parser.error(f'--size is at least 32 and --num-images 1, but got {args.size} and {args.num_images}')
    return args


def main() -> None:
    args = parse_args()
    *models, folder = args.items
    try:
        images = read_images(find_images([folder], args.num_images), args.size)
        subjects = [
            load_subject(text, None if weights == 'none' else weights, args.stage, args.trust_checkpoints)
            for text, weights in zip(models[::2], models[1::2])
        ]
        results = compare_fields(subjects, images, args.out)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    table = Table(title=f'side in pixels (share of the image), {len(images)} images of {args.size} px')
    table.add_column('backbone')
    for head in ('stage', 'stride', *(f'{share:.0%}' for share in SHARES)):
        table.add_column(head, justify='right')
    for result in results:
        squares = [f'{result["sides"][key]:g} ({result["areas"][key]:.1%})' for key in result['sides']]
        table.add_row(result['label'], str(result['stage']), f'{result["stride"]:g}', *squares)
    Console(width=120).print(table)
    print(f'Saved in {args.out}')


if __name__ == '__main__':
    main()
