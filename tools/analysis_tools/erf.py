"""Compare the effective receptive fields of backbones: how much each pixel contributes to the central feature.

CONFIG is a config file of any toolbox, or a registered backbone with its arguments, optionally after LABEL=.
CHECKPOINT has the backbone's weights; `none` leaves them random. IMAGES is an image file or a folder.

Example:
  python tools/analysis_tools/erf.py configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py none \\
      ResNet-50=mmpretrain.ResNet:depth=50 none data/imagenet/val
"""

import argparse

from rich.console import Console
from rich.table import Table

from mmstrip.analysis.receptive_field import SHARES, compare_fields, find_images, load_backbone, read_images
from mmstrip.utils.checkpoints import add_trust_option
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s CONFIG CHECKPOINT [CONFIG CHECKPOINT ...] IMAGES [options]',
    )
    parser.add_argument('items', nargs='+', metavar='CONFIG CHECKPOINT ... IMAGES', help=argparse.SUPPRESS)
    parser.add_argument('--size', type=int, default=224, help='image size in pixels (default: %(default)s)')
    parser.add_argument('--stage', type=int, help="index of the stage, from 0 (default: the config's last)")
    parser.add_argument('--num-images', type=int, default=50, help='number of images (default: %(default)s)')
    parser.add_argument('--out', default='work_dirs/receptive_field', help='folder for results (default: %(default)s)')
    add_trust_option(parser)
    args = parser.parse_args()
    if len(args.items) < 3 or len(args.items) % 2 == 0:
        parser.error(f'give pairs of CONFIG and CHECKPOINT (or none), then IMAGES, but got {len(args.items)} arguments')
    if args.size < 32 or args.num_images < 1:
        parser.error(f'--size must be at least 32 and --num-images 1, but got {args.size} and {args.num_images}')
    return args


def main() -> None:
    args = parse_args()
    *models, folder = args.items
    with short_errors():
        images = read_images(find_images([folder], args.num_images), args.size)
        backbones = [
            load_backbone(text, None if weights == 'none' else weights, args.stage, args.trust_checkpoints)
            for text, weights in zip(models[::2], models[1::2])
        ]
        results = compare_fields(backbones, images, args.out)
    table = Table(title=f'side in pixels (fraction of the image), {len(images)} images of {args.size} px')
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
