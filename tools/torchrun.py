"""PyTorch's torchrun, but with exit code 143 after SIGTERM and 130 after SIGINT instead of 1."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == '__main__':
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
