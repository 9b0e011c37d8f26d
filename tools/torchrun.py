"""PyTorch's torchrun with exit code 143 after SIGTERM, 130 after SIGINT, and without its own traceback below a
process's error."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == '__main__':
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as failure:
        sys.exit(str(failure))
