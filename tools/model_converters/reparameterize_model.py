"""Convert a trained model to its deploy form, with fewer layers and the same outputs.

Example:
  python tools/model_converters/reparameterize_model.py CONFIG work_dirs/NAME/epoch_30.pth deploy.pth
"""

import argparse

from mmstrip.converters.reparameterize import convert_to_deploy
from mmstrip.utils.checkpoints import add_trust_option
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of the trained model')
    parser.add_argument('src', help='checkpoint of the trained model')
    parser.add_argument('dst', help='file to write, .pth or .safetensors')
    add_trust_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with short_errors():
        error = convert_to_deploy(args.config, args.src, args.dst, args.trust_checkpoints)
    print(f'{args.dst}: deploy form; largest difference: {error:.1e} of the largest feature')
    print('Load it with --cfg-options model.backbone.deploy=True')


if __name__ == '__main__':
    main()
