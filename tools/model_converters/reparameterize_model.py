"""Turn a trained model into its deploy form, for inference: fewer steps, same outputs."""

import argparse
import sys

from mmstrip.converters.reparameterize import convert_to_deploy


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of the trained model')
    parser.add_argument('src', help='its checkpoint')
    parser.add_argument('dst', help='file to write, as safetensors if it ends in .safetensors')
    parser.add_argument('--trust-checkpoints', action='store_true', help='run the code that SRC may ask for')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        error = convert_to_deploy(args.config, args.src, args.dst, args.trust_checkpoints)
    except (ImportError, OSError, ValueError) as reason:
        sys.exit(f'Error: {reason}')
    print(f'{args.dst}: deploy form; its features differ by {error:.1e} at most, relative to the largest')
    print('Load it with --cfg-options model.backbone.deploy=True')


if __name__ == '__main__':
    main()
