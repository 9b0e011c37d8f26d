"""Convert a checkpoint of the authors (classification or MLP-DINO) to mmstrip's keys."""

import argparse
import sys

from mmstrip.converters.official import convert_official_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help="the authors' checkpoint, a .safetensors file too")
    parser.add_argument('dst', help='file to write, as safetensors if it ends in .safetensors')
    parser.add_argument('--trust-checkpoints', action='store_true', help='run the code that SRC may ask for')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        result = convert_official_checkpoint(args.src, args.dst, args.trust_checkpoints)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    skipped = f', {result.skipped} tensors outside of the backbone left out' if result.skipped else ''
    print(f'{args.dst}: Strip-MLP {result.arch} from {result.kind}, {len(result.state_dict)} tensors{skipped}')
    arguments = ', '.join(f'{name}={value!r}' for name, value in result.backbone.items())
    print(f"The backbone is dict(type='mmstrip.StripMLP', {arguments})")


if __name__ == '__main__':
    main()
