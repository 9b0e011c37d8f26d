"""Asynchronous copies of numbers from a GPU to the host."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of values (N, ) that the host reads later, without waiting for work queued after them on their device.

    Reading at once (``.item()``, ``bool()``) makes the host wait for all queued work, and then the GPU for the host. On
    CPUs, the copy is ready at once.
    """

    def __init__(self, values: Tensor):
        # Into pinned memory; only a CUDA event tells when the copy is complete.
        self._values = values.detach().to('cpu', non_blocking=values.is_cuda)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> bool:
        """Whether :meth:`read` returns without waiting."""
        return self._event is None or self._event.query()

    def read(self) -> list[float]:
        """The values; waits for this copy, but not for work queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def copies_of(losses: dict[str, Tensor | float]) -> list[tuple[list[str], HostCopy]]:
    """Names and float32 values of scalars, one pair per device, so that no value moves between devices."""
    devices: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in losses.items():
        value = torch.as_tensor(value)
        devices.setdefault(value.device, {})[name] = value.detach().float().reshape(())
    return [(list(values), HostCopy(torch.stack(list(values.values())))) for values in devices.values()]
