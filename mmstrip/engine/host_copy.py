"""Numbers on their way from a GPU to the host, which goes on in the meantime."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a device's numbers that the host reads later, without waiting for what it queues after them.

    Reading them at once (``.item()``, ``bool()``) would let the host wait for all that was queued before, and the
    GPU afterwards for the host.

    Args:
        values (Tensor): (N, ) on any device. On CPUs nothing has to be waited for.
    """

    def __init__(self, values: Tensor):
        # Into pinned memory; only CUDA's events say when such a copy is there.
        self._values = values.detach().to('cpu', non_blocking=values.is_cuda)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> bool:
        """Whether :meth:`read` would return without waiting."""
        return self._event is None or self._event.query()

    def read(self) -> list[float]:
        """The numbers; waits for them, and for nothing that was queued after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
