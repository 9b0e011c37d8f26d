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
@settings(max_examples=60)
def test_batched_windows_equal_a_loop(size, extent):
    x = torch.randn(2, 3, *size)
    mixing = torch.randn(4, 3)
    position = torch.randn(1, 1, *extent)

    def function(window):  # depends on the place in the window and on its other tokens
        return torch.einsum('oc,nchw->nohw', mixing, window * position) + window.sum(dim=(2, 3), keepdim=True)[:, :1]

    torch.testing.assert_close(
        run_in_windows(function, x, extent), loop_over_windows(function, x, extent), rtol=1e-4, atol=1e-4
    )


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), extent=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=60)
@example(size=(6, 3), extent=(2, 1))  # the last windows are the same
def test_gradients_of_windows(size, extent):
    """By operators and without, against the loop."""
    weight = torch.randn(1, 1, *extent, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))

    def function(window):
        return window * weight + window.flip(2).sum(dim=3, keepdim=True)

    def gradient(run):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((run(function, leaf, extent) * upstream).sum(), leaf)[0]

    expected = gradient(loop_over_windows)
    torch.testing.assert_close(gradient(run_in_windows), expected, rtol=1e-4, atol=1e-4)
    if HAS_OPERATORS:
        by_operators = partial(run_in_windows, split=split_windows, merge=merge_windows)
        torch.testing.assert_close(gradient(by_operators), expected, rtol=1e-4, atol=1e-4)


@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)))
@settings(max_examples=25)
@example(size=(7, 5))
@example(size=(14, 10))
def test_strip_mixing_equals_a_loop(size):
    torch.manual_seed(0)
    module = CascadeGroupStripMixing(8, extent=(7, 5), num_patches=4).eval()
    u = torch.randn(2, 8, *size)
    with torch.no_grad():
        mixed = loop_over_windows(module.mix_window, u, module.extent)
        expected = module.fuse_column(torch.cat([u, mixed], dim=1))
        torch.testing.assert_close(module(u), expected, rtol=1e-4, atol=1e-5)


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
