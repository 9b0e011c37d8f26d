"""Convert a checkpoint of the authors (classification or MLP-DINO) to mmstrip's keys.

Example:
  python tools/model_converters/official_to_mmstrip.py theirs.pth checkpoints/strip-mlp-tiny_in1k.pth
"""

import argparse

from mmstrip.converters.official import convert_official_checkpoint
from mmstrip.utils.checkpoints import add_trust_option
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', help="the authors' checkpoint, .pth or .safetensors")
    parser.add_argument('dst', help='file to write, .pth or .safetensors')
    add_trust_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with short_errors():
        result = convert_official_checkpoint(args.src, args.dst, args.trust_checkpoints)
    skipped = f', {result.skipped} tensors outside the backbone skipped' if result.skipped else ''
    print(f'{args.dst}: Strip-MLP {result.arch} from {result.kind}, {len(result.state_dict)} tensors{skipped}')
    arguments = ', '.join(f'{name}={value!r}' for name, value in result.backbone.items())
    print(f"Backbone config: dict(type='mmstrip.StripMLP', {arguments})")


if __name__ == '__main__':
    main()
