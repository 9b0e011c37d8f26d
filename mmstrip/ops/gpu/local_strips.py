"""LSMM as one convolution: a * tall + b * wide + c * u is one 7x7 kernel for each image and channel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import stock
from ...models.strip_mixing import LocalStripMixing
from .compiled import Compiled, channel_major
from .depthwise import depthwise

SIDE = 7


class CompiledLocalStripMixing(Compiled, LocalStripMixing):
    reference = LocalStripMixing
    layers = dict(
        tall=stock.depthwise(7, 3),
        wide=stock.depthwise(3, 7),
        reweight=stock.sequence(stock.pointwise(bias=True), stock.gelu, stock.pointwise(bias=True)),
    )

    def forward(self, u: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if valid is not None or not self.may_run(u):
            return super().forward(u, valid=valid)
        u = channel_major(u)
        kernels = torch.stack(  # (3, C, 7, 7)
            [
                F.pad(self.tall.weight[:, 0], (2, 2)),
                F.pad(self.wide.weight[:, 0], (0, 0, 2, 2)),
                F.pad(torch.ones_like(self.tall.weight[:, 0, :1, :1]), (3, 3, 3, 3)),
            ]
        )
        use = tap_uses(kernels.sum(0), u.shape[2:])
        average = (u * use[:, None]).mean(dim=(2, 3))  # (C, N), in float32: of tall + wide + u
        narrow, _, broad = self.reweight
        hidden = F.gelu(small_linear(narrow.weight.flatten(1), average) + narrow.bias[:, None])
        logits = small_linear(broad.weight.flatten(1), hidden) + broad.bias[:, None]
        a, b, c = logits.unflatten(0, (-1, 3)).unbind(1)  # (C, N) each
        largest = torch.maximum(torch.maximum(a, b), c).detach()
        shares = [(logit - largest).exp() for logit in (a, b, c)]
        total = shares[0] + shares[1] + shares[2]
        kernel = sum((share / total)[:, :, None, None] * one[:, None] for share, one in zip(shares, kernels))
        return depthwise(u, kernel).transpose(0, 1)


def tap_uses(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """How often, times the weight, a kernel (C, K, K) reads each token of a map of a size: (C, H, W)."""
    tall, wide = (_reads(length, kernel.shape[-1], kernel) for length in size)
    return (kernel[:, None, None] * (tall[:, None, :, None] * wide[None, :, None, :])).sum((3, 4))


def _reads(length: int, side: int, like: Tensor) -> Tensor:
    """(length, side): whether the output that would read a token by a weight is in the map."""
    token = torch.arange(length, device=like.device)[:, None]
    output = token + side // 2 - torch.arange(side, device=like.device)
    return ((output >= 0) & (output < length)).to(like.dtype)


def small_linear(weight: Tensor, x: Tensor) -> Tensor:
    """weight (O, C) times x (C, N), where compilers make one kernel of it and what stands around it."""
    return (weight[:, :, None] * x[None]).sum(1)
