"""The exponential moving average (EMA) of a model's weights, in a few calls per update."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from mmengine import model as mmengine
from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class ExponentialMovingAverage(mmengine.ExponentialMovingAverage):
    """mmengine's average with one call for all tensors that are alike, instead of one call per tensor.

    Values, arguments and state dict are mmengine's. In a config:
    ``EMAHook(ema_type='mmstrip.ExponentialMovingAverage')``.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average by a model's weights."""
        sources = model.state_dict() if self.update_buffers else dict(model.named_parameters())
        pairs = [(average, sources[name]) for name, average in self.avg_parameters.items()]
        if self.steps == 0:
            _for_each(torch._foreach_copy_, pairs)
        elif self.steps % self.interval == 0:
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            _for_each(partial(torch._foreach_lerp_, weight=self.momentum), floats)
        if not self.update_buffers:
            _for_each(torch._foreach_copy_, zip(self.module.buffers(), model.buffers()))
        self.steps += 1


def _for_each(function: Callable, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Call a function of two lists of tensors; lists that mix types, devices or layouts take a call per tensor."""
    groups = defaultdict(list)
    for average, source in pairs:
        groups[average.device, average.dtype, average.stride() == source.stride()].append(
            (average.data, source.data.to(average.device))
        )
    for group in groups.values():
        function(*map(list, zip(*group)))
