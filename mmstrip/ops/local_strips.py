"""LSMM (Section 3.4) as one operator: both depthwise convolutions and the MLP that weighs them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..models import stock
from ..models.strip_mixing import LocalStripMixing
from . import depthwise
from .autograd import call_formula, is_differentiated, needs_gradient, reference_gradients
from .fast import Fast

operators = torch.ops.mmstrip


class FastLocalStripMixing(Fast, LocalStripMixing):
    reference = LocalStripMixing
    layers = dict(
        tall=stock.depthwise(7, 3),
        wide=stock.depthwise(3, 7),
        reweight=stock.sequence(stock.pointwise(bias=True), stock.gelu, stock.pointwise(bias=True)),
    )

    def forward(self, u: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if valid is not None or not self.may_run(u):
            return super().forward(u, valid=valid)
        narrow, _, broad = self.reweight
        mlp = narrow.weight, narrow.bias, broad.weight, broad.bias
        return local_strips(u, self.tall.weight, self.wide.weight, *mlp)


def reference(u: Tensor, tall: Tensor, wide: Tensor, *mlp: Tensor) -> Tensor:
    return call_formula(
        LocalStripMixing,
        u,
        tall=partial(depthwise.reference, weight=tall),
        wide=partial(depthwise.reference, weight=wide),
        reweight=lambda average: F.conv2d(F.gelu(F.conv2d(average, *mlp[:2])), *mlp[2:]),
    )


def local_strips(
    u: Tensor, tall: Tensor, wide: Tensor, narrow: Tensor, narrow_bias: Tensor, broad: Tensor, broad_bias: Tensor
) -> Tensor:
    """LSMM of (N, C, H, W).

    Args:
        u: (N, C, H, W).
        tall, wide: (C, 1, 7, 3) and (C, 1, 3, 7).
        narrow, narrow_bias: First layer of the MLP, (E, C, 1, 1) and (E, ).
        broad, broad_bias: Second layer, after GELU, (3 C, E, 1, 1) and (3 C, ).
    """
    arguments = u, tall, wide, narrow, narrow_bias, broad, broad_bias
    if needs_gradient(*arguments):
        return _LocalStrips.apply(*arguments)
    return operators.local_strips(*arguments)[0]


class _LocalStrips(Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        out, *saved = operators.local_strips(*inputs)
        ctx.save_for_backward(*inputs, *saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, saved = tensors[:7], tensors[7:]
        required = ctx.needs_input_grad
        if is_differentiated([grad]):
            return tuple(reference_gradients(reference, inputs, [grad], required))
        u, tall, wide, narrow, _, broad, _ = inputs
        return operators.local_strips_backward(grad, u, tall, wide, narrow, broad, *saved, required)
