"""The process that works through steps of the report on a GPU; its argument is JSON, see :func:`.steps.run_part`."""

import json
import sys

from .steps import Setting, work

if __name__ == '__main__':
    job = json.loads(sys.argv[1])
    sys.exit(0 if work(job['part'], job['names'], Setting(**job['setting'])) else 1)
