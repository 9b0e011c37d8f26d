"""Parameters and FLOPs (multiply-adds, as the paper counts) of a config's model."""

import argparse

from mmengine.config import DictAction
from mmengine.registry import MODELS, init_default_scope

from mmstrip.analysis.complexity import analyze_complexity
from mmstrip.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape', type=int, nargs='+', default=[224], metavar=('H', 'W'), help='image size (default: 224)'
    )
    parser.add_argument('--channels', type=int, default=3, help='image channels (default: 3)')
    parser.add_argument('--table', action='store_true', help='print a table of all modules too')
    parser.add_argument('--depth', type=int, default=3, help='how deep the table goes (default: 3)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override parts of the config'
    )
    args = parser.parse_args()
    if len(args.shape) > 2:
        parser.error(f'--shape takes one side or H W, but got {args.shape}')
    return args


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.cfg_options)
    init_default_scope(config.get('default_scope', 'mmengine'))
    height, width = args.shape[0], args.shape[-1]
    shape, depth = (args.channels, height, width), args.depth if args.table else 0
    complexity = analyze_complexity(MODELS.build(config.model), shape, depth)
    if args.table:
        print(complexity.table)
    print(f'Input:  {args.channels} x {height} x {width}')
    print(f'Params: {complexity.params / 1e6:.2f} M ({complexity.params:,})')
    print(f'FLOPs:  {complexity.flops / 1e9:.2f} G ({complexity.flops:,})')


if __name__ == '__main__':
    main()
