"""Write the weights of a trained model to a file of their own, without the state of the training.

Example:
  python tools/model_converters/publish_model.py CONFIG work_dirs/NAME/epoch_30.pth model.safetensors --half
"""

import argparse

from mmstrip.converters.publish import publish_model
from mmstrip.utils.checkpoints import add_trust_option
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of the trained model')
    parser.add_argument('src', help='checkpoint of the trained model')
    parser.add_argument('dst', help='file to write, .pth or .safetensors')
    parser.add_argument('--half', action='store_true', help='store weights in float16, for half the file size')
    add_trust_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with short_errors():
        meta = publish_model(args.config, args.src, args.dst, args.half, args.trust_checkpoints)
    classes = (meta.get('dataset_meta') or {}).get('classes') or ()
    print(f'{args.dst}: {meta["config"]}, names of {len(classes)} classes')


if __name__ == '__main__':
    main()
