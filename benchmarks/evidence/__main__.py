"""Train networks that test the paper's claims on public images, and write docs/results.md from the results.

Runs that already have a JSON file in docs/results are skipped; interrupted runs resume."""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path

from .experiments import PARTS, planned_runs
from .page import write_page
from .queue import Queue, print_list
from .run import read_results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='default: all')
    parser.add_argument('--jobs', type=int, default=1, help='cores to use; most runs use one (default: 1)')
    parser.add_argument('--list', action='store_true', help='print the runs and exit')
    parser.add_argument('--data-root', default='data', help='folder of the data sets (default: %(default)s)')
    parser.add_argument('--work-dir', default='work_dirs/evidence', help='logs and checkpoints (default: %(default)s)')
    parser.add_argument('--results', default='docs/results', help='folder of the results (default: %(default)s)')
    parser.add_argument('--report', action='store_true', help='write the page from the existing results and exit')
    parser.add_argument('--page', default='docs/results.md', help='page with the tables (default: %(default)s)')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, but got {args.jobs}')
    return args


def main() -> None:
    args = parse_args()
    runs, results = partial(planned_runs, args.parts), Path(args.results)
    if args.list:
        found = read_results(results)
        print_list(runs(found), found)
        return
    if args.report:
        print(*write_page(results, Path(args.page), Path(args.work_dir)), sep='\n')
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('Stopped; run the same command to resume'))
    left = Queue(runs, results, Path(args.work_dir).absolute(), args.data_root, args.jobs).work()
    if left:
        sys.exit(f'Error: {left} runs have no result; see their logs in {args.work_dir}')


if __name__ == '__main__':
    main()
