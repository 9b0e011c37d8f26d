"""Write the weights of a trained model to a file of its own, without optimizer and other state of the training."""

import argparse
import sys

from mmstrip.converters.publish import publish_model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of the trained model')
    parser.add_argument('src', help='its checkpoint')
    parser.add_argument('dst', help='file to write, as safetensors if it ends in .safetensors')
    parser.add_argument('--half', action='store_true', help='store weights in float16, half of the size')
    parser.add_argument('--trust-checkpoints', action='store_true', help='run the code that SRC may ask for')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        meta = publish_model(args.config, args.src, args.dst, args.half, args.trust_checkpoints)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    classes = (meta.get('dataset_meta') or {}).get('classes') or ()
    print(f'{args.dst}: {meta["config"]}, names of {len(classes)} classes')


if __name__ == '__main__':
    main()
