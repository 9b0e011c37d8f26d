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


def copies_of(losses: dict[str, Tensor | float]) -> list[tuple[list[str], HostCopy]]:
    """Names and float32 values of scalars, those of each device by themselves, so that none is moved to be stacked."""
    devices: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in losses.items():
        value = torch.as_tensor(value)
        devices.setdefault(value.device, {})[name] = value.detach().float().reshape(())
    return [(list(values), HostCopy(torch.stack(list(values.values())))) for values in devices.values()]
