"""Each box of the strip mixing against its formula, written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmstrip.models.channel_mixing import GlobalResponseNorm
from mmstrip.models.strip_mixing import (
    CascadeGroupStripMixing,
    LocalStripMixing,
    RelativePosition,
    StripMLPLayer,
)


def strip_layer_by_formula(layer, x):
    """y[i, g, h, w'] = b[g, w'] + sum_k sum_w K[g, k, w', w] x[i, g, h + k, w], with zeros outside, over rows."""
    if layer.axis == 'column':
        x = x.transpose(2, 3)
    patches, strip_width, tokens, _ = layer.weight.shape
    batch, channels, lines, _ = x.shape
    y = torch.empty_like(x)
    for channel in range(channels):
        patch = channel % patches
        for line in range(lines):
            total = layer.bias[patch].expand(batch, tokens)
            for k in range(strip_width):
                neighbour = line + k - strip_width // 2
                if 0 <= neighbour < lines:
                    total = total + x[:, channel, neighbour] @ layer.weight[patch, k].t()
            y[:, channel, line] = total
    return y.transpose(2, 3) if layer.axis == 'column' else y


@given(
    tokens=st.integers(1, 9),
    lines=st.integers(1, 9),
    patches=st.integers(1, 4),
    size=st.integers(1, 3),
    strip_width=st.sampled_from([1, 3, 5, 7]),
    axis=st.sampled_from(['row', 'column']),
)
@settings(max_examples=60)
def test_strip_layer_is_the_formula(tokens, lines, patches, size, strip_width, axis):
    layer = StripMLPLayer(tokens, patches, strip_width, axis)
    height, width = (lines, tokens) if axis == 'row' else (tokens, lines)
    x = torch.randn(2, patches * size, height, width, requires_grad=True)
    got, expected = layer(x), strip_layer_by_formula(layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, (x, layer.weight, layer.bias), upstream) for y in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('extent', [(4, 4), (3, 6), (6, 2)])
def test_positions_come_from_clipped_offsets(extent):
    span = extent[0]
    position = RelativePosition(5, extent, span)
    x = torch.randn(2, 5, *extent)
    added = position(x) - x
    for h in range(extent[0]):
        for w in range(extent[1]):
            row = min(max(w - h, -span), span) + span
            torch.testing.assert_close(position.expand()[:, h, w], position.table[row])
            torch.testing.assert_close(added[:, :, h, w], position.table[row].expand(2, 5), rtol=1e-4, atol=1e-6)


def test_cascade_and_parallel_are_as_written():
    u = torch.randn(2, 8, 6, 6)
    for cascade in (True, False):
        module = CascadeGroupStripMixing(8, (6, 6), num_patches=4, cascade=cascade).eval()
        row = module.row(u + module.position_row.expand())
        v = F.gelu(module.norm(module.fuse_row(torch.cat([row, u], dim=1))))
        column = module.column((v if cascade else u) + module.position_column.expand())
        expected = module.fuse_column(torch.cat([u if cascade else v, column], dim=1))
        torch.testing.assert_close(module(u), expected)


def test_local_strip_mixing_weighs_three_paths():
    module = LocalStripMixing(6)
    u = torch.randn(2, 6, 9, 8)
    paths = torch.stack([module.tall(u), module.wide(u), u], dim=2)
    scores = module.reweight(paths.sum(dim=2).mean(dim=(2, 3), keepdim=True)).view(2, 6, 3)
    expected = (paths * scores.softmax(dim=-1)[..., None, None]).sum(dim=2)
    torch.testing.assert_close(module(u), expected)
    assert module.tall.kernel_size == (7, 3) and module.wide.kernel_size == (3, 7)


def test_averages_leave_padding_out():
    lsmm, norm = LocalStripMixing(6), GlobalResponseNorm(6)
    torch.nn.init.normal_(norm.gamma)
    padded = torch.randn(2, 6, 9, 8)
    valid = torch.zeros(2, 1, 9, 8, dtype=torch.bool)
    valid[0, :, :5, :6] = valid[1] = True
    padded[0, :, 5:] = torch.inf
    image = padded[:1, :, :5, :6]
    torch.testing.assert_close(
        norm(padded.permute(0, 2, 3, 1), valid=valid.permute(0, 2, 3, 1))[:1, :5, :6], norm(image.permute(0, 2, 3, 1))
    )
    padded[0, :, 5:] = 1
    paths = torch.stack([lsmm.tall(padded), lsmm.wide(padded), padded], dim=2)
    scores = lsmm.reweight(paths[:1, ..., :5, :6].sum(dim=2).mean(dim=(2, 3), keepdim=True)).view(1, 6, 3)
    expected = (paths[:1] * scores.softmax(dim=-1)[..., None, None]).sum(dim=2)
    torch.testing.assert_close(lsmm(padded, valid=valid)[:1], expected)
    torch.testing.assert_close(lsmm(padded, valid=valid)[1:], lsmm(padded[1:]))


def test_global_response_norm():
    norm = GlobalResponseNorm(5)
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(norm(x), x)  # starts as the identity
    torch.nn.init.normal_(norm.gamma), torch.nn.init.normal_(norm.beta)
    g = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    torch.testing.assert_close(norm(x), norm.gamma * x * g / (g.mean(-1, keepdim=True) + 1e-6) + norm.beta + x)
