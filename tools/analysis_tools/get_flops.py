"""Count the parameters and FLOPs (multiply-adds, as in the paper) of a config's model.

Example:
  python tools/analysis_tools/get_flops.py configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py --shape 224 224
"""

import argparse

from mmstrip.analysis.complexity import analyze_complexity
from mmstrip.utils.config import add_config_options, build_model, load_model_config
from mmstrip.utils.errors import short_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape', type=int, nargs='+', default=[224], metavar=('H', 'W'), help='image size in pixels (default: 224)'
    )
    parser.add_argument('--channels', type=int, default=3, help='image channels (default: 3)')
    parser.add_argument('--table', action='store_true', help='also print a table of all modules')
    parser.add_argument('--depth', type=int, default=3, help='depth of modules in the table (default: 3)')
    add_config_options(parser)
    args = parser.parse_args()
    if len(args.shape) > 2:
        parser.error(f'--shape takes one side or H W, but got {" ".join(map(str, args.shape))}')
    return args


def main() -> None:
    args = parse_args()
    height, width = args.shape[0], args.shape[-1]
    shape, depth = (args.channels, height, width), args.depth if args.table else 0
    with short_errors():
        config = load_model_config(args.config, args.cfg_options)
        complexity = analyze_complexity(build_model(config.model), shape, depth)
    if args.table:
        print(complexity.table)
    print(f'Input:  {args.channels} x {height} x {width}')
    print(f'Params: {complexity.params / 1e6:.2f} M ({complexity.params:,})')
    print(f'FLOPs:  {complexity.flops / 1e9:.2f} G ({complexity.flops:,})')


if __name__ == '__main__':
    main()
