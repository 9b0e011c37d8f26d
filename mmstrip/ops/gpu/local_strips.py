"""LSMM as one convolution: a * tall + b * wide + c * u is one 7x7 kernel for each image and channel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import stock
from ...models.strip_mixing import LocalStripMixing
from .depthwise import depthwise
from .formula import Formula

SIDE = 7


class FormulaLocalStripMixing(Formula, LocalStripMixing):
    reference = LocalStripMixing
    layers = dict(
        tall=stock.depthwise(7, 3),
        wide=stock.depthwise(3, 7),
        reweight=stock.sequence(stock.pointwise(bias=True), stock.gelu, stock.pointwise(bias=True)),
    )

    def run(self, u: Tensor, statistics: list, beside: Tensor | None = None) -> Tensor:
        """With a map beside, the result comes after it, in one (2 C, N, H, W)."""
        tall = F.pad(self.tall.weight[:, 0], (2, 2))
        wide = F.pad(self.wide.weight[:, 0], (0, 0, 2, 2))
        itself = F.pad(tall.new_ones(1, 1, 1), (3, 3, 3, 3))
        reads = token_reads(tall + wide + itself, u.shape[2:])
        average = (u * reads[:, None]).mean(dim=(2, 3))  # (C, N): of tall + wide + u
        narrow, act, broad = self.reweight
        hidden = act(small_linear(narrow.weight.flatten(1), average) + narrow.bias[:, None])
        weights, biases = broad.weight.flatten(1).unflatten(0, (-1, 3)), broad.bias.unflatten(0, (-1, 3))
        logits = [small_linear(weights[:, i], hidden) + biases[:, i, None] for i in range(3)]
        a, b, c = (share[:, :, None, None] for share in torch.stack(logits).softmax(0))
        return depthwise(u, a * tall[:, None] + b * wide[:, None] + c * itself[:, None], beside)


def token_reads(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The sum of the weights by which a kernel (C, K, K) reads each token of a map of a size: (C, H, W)."""
    tall, wide = (_is_read(length, kernel) for length in size)
    return (kernel[:, None, None] * (tall[:, None, :, None] * wide[None, :, None, :])).sum((3, 4))


def _is_read(length: int, kernel: Tensor) -> Tensor:
    """(length, K): whether the output that would read a token by a weight is in the map."""
    side = kernel.shape[-1]
    token = torch.arange(length, device=kernel.device)[:, None]
    output = token + side // 2 - torch.arange(side, device=kernel.device)
    return ((output >= 0) & (output < length)).to(kernel.dtype)


def small_linear(weight: Tensor, x: Tensor) -> Tensor:
    """weight (O, C) times x (C, N), where compilers make one kernel of it and what stands around it."""
    return (weight[:, :, None] * x[None]).sum(1)
