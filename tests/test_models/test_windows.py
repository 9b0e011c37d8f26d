"""Windows of any map size against the rule as written, one window at a time."""

from functools import partial

import torch
import torch.nn.functional as F
from helpers import HAS_OPERATORS, randomise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian

import mmstrip
from mmstrip.models.strip_mixing import CascadeGroupStripMixing
from mmstrip.models.windows import count_and_stride, run_in_windows
from mmstrip.ops.windows import merge_windows, split_windows


def starts_by_rule(length: int, extent: int) -> list:
    """Starts of the windows along an axis, in floating point as the rule is published."""
    if length <= extent:
        return [0]
    count = round(length / extent + 0.5)
    overlap = round((count * extent - length) / (count - 1) - 0.5)
    return [min(i * (extent - overlap), length - extent) for i in range(count)]


def loop_over_windows(function, x, extent):
    """Every window by itself, averaged where they overlap."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, max(extent[1] - width, 0), 0, max(extent[0] - height, 0)))
    total, count = 0, torch.zeros(1, 1, *x.shape[2:])
    for top in starts_by_rule(height, extent[0]):
        for left in starts_by_rule(width, extent[1]):
            area = (slice(None), slice(None), slice(top, top + extent[0]), slice(left, left + extent[1]))
            part = function(x[area])
            if isinstance(total, int):
                total = torch.zeros(*part.shape[:2], *x.shape[2:])
            total[area] += part
            count[area] += 1
    return (total / count)[:, :, :height, :width]


@given(length=st.integers(2, 2000), extent=st.integers(1, 64))
@settings(max_examples=300)
@example(length=3, extent=1)
@example(length=6, extent=2)
@example(length=42, extent=14)
def test_layout_is_the_published_one(length, extent):
    if length <= extent:
        length += extent
    count, stride = count_and_stride(length, extent)
    starts = starts_by_rule(length, extent)
    assert [min(i * stride, length - extent) for i in range(count)] == starts
    covering = torch.zeros(length)
    for start in set(starts):
        covering[start : start + extent] += 1
    assert set(covering.tolist()) <= {1, 2}


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), extent=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=100)
@example(size=(6, 3), extent=(2, 1))  # the last windows are the same
@example(size=(14, 10), extent=(7, 5))
def test_batched_windows_equal_a_loop(size, extent):
    """Values and gradients, by operators and without."""
    x, position = torch.randn(2, 3, *size, requires_grad=True), torch.randn(1, 1, *extent)
    mixing, upstream = torch.randn(4, 3), torch.randn(2, 4, *size)

    def function(window):  # depends on the place in the window and on its other tokens
        return torch.einsum('oc,nchw->nohw', mixing, window * position) + window.flip(2).sum(dim=(1, 3), keepdim=True)

    def run(windows):
        out = windows(function, x, extent)
        return out, *torch.autograd.grad(out, x, upstream)

    ways = run_in_windows, partial(run_in_windows, split=split_windows, merge=merge_windows)
    for windows in ways[: 1 + HAS_OPERATORS]:
        torch.testing.assert_close(run(windows), run(loop_over_windows), rtol=1e-4, atol=1e-4)


def test_all_windows_go_in_one_call():
    calls = []
    run_in_windows(lambda x: calls.append(x.shape) or x, torch.randn(2, 3, 20, 33), (7, 7))
    assert calls == [(2 * 3 * 5, 3, 7, 7)]


def test_second_derivatives_that_are_batched():
    """Those of sums of windows and of parts in a mean: the gradients of cutting and of merging."""
    mixing = mmstrip.accelerate(randomise(CascadeGroupStripMixing(2, (4, 4), num_patches=1)).eval())
    x = torch.randn(1, 2, 6, 7)
    batched, one_by_one = (hessian(lambda x: mixing(x).pow(3).sum(), x, vectorize=both) for both in (True, False))
    torch.testing.assert_close(batched, one_by_one)
