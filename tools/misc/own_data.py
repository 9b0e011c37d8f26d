"""Write a config for your own images: read a folder, report what it contains, print the commands to train and test.

Example:
  python tools/misc/own_data.py classification data/flowers --init checkpoints/strip-mlp-tiny-light_in1k.pth
"""

import argparse
import inspect
import shlex
from pathlib import Path

from mmstrip.own_data import write_classification, write_detection, write_segmentation
from mmstrip.own_data.detection import MODELS as DETECTORS
from mmstrip.own_data.segmentation import MODELS as SEGMENTORS
from mmstrip.utils.errors import printable, short_errors

WRITERS = dict(classification=write_classification, detection=write_detection, segmentation=write_segmentation)
MODELS = dict(detection=tuple(DETECTORS), segmentation=tuple(SEGMENTORS))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest='task', required=True)
    for name, writer in WRITERS.items():
        task = tasks.add_parser(name, help=inspect.getdoc(writer).split('\n')[0])
        task.add_argument('folder', help='folder of the images')
        task.add_argument('--out', help='folder for the config (default: own_data/NAME_OF_FOLDER)')
        task.add_argument(
            '--init', metavar='CHECKPOINT', help='checkpoint to fine-tune (default: none, random weights)'
        )
        task.add_argument('--arch', help='tiny-light, tiny, small or base (default: that of --init, else tiny-light)')
        task.add_argument(
            '--size', type=int, help='image size in pixels: side of the crops, for detectors the short side'
        )
        task.add_argument('--epochs', type=int, help='number of training epochs')
        task.add_argument('--batch-size', type=int, help='images per batch')
        if name in MODELS:
            task.add_argument(
                '--model', choices=MODELS[name], default=MODELS[name][0], help='model (default: %(default)s)'
            )
        if name == 'segmentation':
            task.add_argument('--classes', metavar='FILE', help='file with the class names, one per line')
    return parser.parse_args()


def main() -> None:
    options = vars(parse_args())
    with short_errors():
        written = WRITERS[options.pop('task')](**options)
    config, work_dir = shlex.quote(str(written.config)), Path('work_dirs') / written.config.stem
    checkpoint = f'"$(cat {shlex.quote(str(work_dir))}/last_checkpoint)"'
    print(*map(printable, [*written.found, f'wrote {config}']), '', sep='\n')
    print(f'python tools/train.py {config} --amp auto')
    print(f'python tools/test.py {config} {checkpoint} --show-dir {shlex.quote(f"{work_dir}/pictures")}')


if __name__ == '__main__':
    main()
