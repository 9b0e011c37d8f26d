"""PyTorch's torchrun, which ends with exit code 143 when it was stopped by SIGTERM (130: SIGINT), not with 1."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == '__main__':
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
