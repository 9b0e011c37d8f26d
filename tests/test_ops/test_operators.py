"""Compiled operators against the formulas of the modules in float64: values, gradients, bad arguments, layouts."""

import contextlib
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import run
from hypothesis import given, settings
from hypothesis import strategies as st

from mmstrip.models import windows as formulas_of_windows
from mmstrip.ops import channel_mlp, depthwise, extension, local_strips, norm_gelu, pointwise, strip_layer, windows

REASON = extension.load()
if extension.is_switched_off():
    pytest.skip(REASON, allow_module_level=True)

operators = torch.ops.mmstrip
EXAMPLES = settings(max_examples=12)
MAPS = st.tuples(st.integers(1, 3), st.integers(1, 35), st.integers(1, 9), st.integers(1, 17))


@pytest.fixture(scope='module', autouse=True)
def library():
    """One that stops compiling fails the suite; MMSTRIP_NATIVE=0 says that there is none to expect."""
    assert REASON is None, REASON


# Formulas, of tensors of any precision.


def strip_layer_by_formula(x, weight, bias, row, position=None):
    if not row:
        bias = bias.transpose(1, 2) if bias.dim() == 3 else bias
        position = None if position is None else position.transpose(1, 2)
        return strip_layer_by_formula(x.transpose(2, 3), weight, bias, True, position).transpose(2, 3)
    patches, strip_width, _, _ = weight.shape
    lines, pad = x.shape[2], strip_width // 2
    x = F.pad(x if position is None else x + position, (0, 0, pad, pad)).unflatten(1, (-1, patches))
    out = sum(torch.einsum('gvw,nighw->nighv', weight[:, k], x[..., k : k + lines, :]) for k in range(strip_width))
    return out.flatten(1, 2) + (bias if bias.dim() == 3 else bias.repeat(out.shape[1], 1)[:, None])


def stage(x, blocks, eps, layout):
    """Deployed blocks, as csrc/stage.cpp lists their tensors; ``layout``: extent, counts and strides of windows."""
    for tensors, (norm_eps, layer_norm_eps, response_eps) in zip(blocks, eps):
        *norm, kernel, project, project_bias, row, row_bias, fuse_row, fuse_row_bias = tensors[:11]
        column, column_bias, *local, fuse, channel_kernel, expand, expand_bias, gamma, reduce, reduce_bias = tensors[
            11:
        ]

        y = depthwise.reference(norm_gelu.reference(x, *norm, norm_eps), kernel)
        first, second = F.gelu(F.conv2d(y, project, project_bias)).chunk(2, 1)
        u = formulas_of_windows.split_windows(first, *layout)
        u = torch.cat([strip_layer_by_formula(u, row, row_bias, True), u], 1)
        u = strip_layer_by_formula(F.gelu(F.conv2d(u, fuse_row, fuse_row_bias)), column, column_bias, False)
        mixed = formulas_of_windows.merge_windows(u, x.shape[2:], *layout[1:])
        x = x + F.conv2d(torch.cat([first, mixed, local_strips.reference(second, *local)], 1), fuse)
        mlp = None, None, layer_norm_eps, expand, expand_bias, gamma, None, response_eps, reduce, reduce_bias
        x = x + channel_mlp.reference(depthwise.reference(x, channel_kernel), *mlp)
    return x


# Comparison.


def close(got, expected, tolerance=1e-4):
    expected = expected.float()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(1, expected.abs().max().item()))


def results_of(function, tensors, required):
    """Outputs, and gradients of the tensors that require one, given fixed ones of the outputs."""
    leaves = [tensor.detach().clone().requires_grad_(need) for tensor, need in zip(tensors, required)]
    outs = function(*leaves)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    if not any(required):
        assert not any(out.requires_grad for out in outs)
        return [*outs, *[None] * len(leaves)]
    generator = torch.Generator().manual_seed(0)
    torch.autograd.backward(outs, [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs])
    return [*(out.detach() for out in outs), *(leaf.grad for leaf in leaves)]


def assert_operator(function, formula, *tensors, values=1e-4, gradients=2e-4):
    """Outputs and gradients: of all tensors, of each alone, and of none."""
    count = len(tensors)
    expected = results_of(formula, [tensor.double() for tensor in tensors], [True] * count)
    for required in ([True] * count, [False] * count, *([i == j for j in range(count)] for i in range(count))):
        found = results_of(function, tensors, required)
        assert [value is not None for value in found] == [True] * (len(found) - count) + required
        for i, (got, value) in enumerate(zip(found, expected)):
            if got is not None:
                close(got, value, values if i < len(found) - count else gradients)


def flat(values):
    """All tensors in nested lists."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)] if isinstance(values, (list, tuple)) else []


# Operators.


@EXAMPLES
@given(size=MAPS, height=st.sampled_from([1, 3, 5, 9]), width=st.sampled_from([1, 3, 5, 7]))
def test_depthwise(size, height, width):
    x, weight = torch.randn(size), torch.randn(size[1], 1, height, width)
    assert_operator(depthwise.depthwise, depthwise.reference, x, weight)


def norm_arguments(channels):
    """Weight, bias, mean and variance."""
    return torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5


def norm_by(weight, bias, mean, variance, training):
    """A layer of BN."""
    return SimpleNamespace(
        **dict(weight=weight, bias=bias, running_mean=mean, running_var=variance, training=training),
        **dict(momentum=0.3, eps=1e-5, num_batches_tracked=torch.tensor(0)),
    )


def assert_statistics(norm, mean, variance, x):
    """Those of a norm that has seen x once, in training, or is as it was."""
    if norm.training:
        x = x.double()
        mean = 0.7 * mean.double() + 0.3 * x.mean((0, 2, 3))
        variance = 0.7 * variance.double() + 0.3 * x.var((0, 2, 3))
    assert norm.num_batches_tracked == norm.training
    close(norm.running_mean, mean)
    close(norm.running_var, variance)


@EXAMPLES
@given(size=MAPS.filter(lambda size: size[0] * size[2] * size[3] > 1), training=st.booleans())
def test_norm_gelu_depthwise(size, training):
    x, weight = torch.randn(size), torch.randn(size[1], 1, 3, 3)
    *affine, mean, variance = norm_arguments(size[1])

    def function(x, weight, *affine):
        norm = norm_by(*affine, mean.clone(), variance.clone(), training)
        out = depthwise.norm_gelu_depthwise(x, norm, weight)
        assert_statistics(norm, mean, variance, x)
        return out

    def formula(x, weight, *affine):
        statistics = () if training else (mean, variance)
        return depthwise.reference(norm_gelu.reference(x, *affine, *statistics, eps=1e-5), weight)

    assert_operator(function, formula, x, weight, *affine)


@EXAMPLES
@given(size=MAPS, outputs=st.integers(1, 70), more=st.integers(0, 20), biased=st.booleans())
def test_pointwise(size, outputs, more, biased):
    parts = [torch.randn(size)] + ([torch.randn(size[0], more, *size[2:])] if more else [])
    weight, bias = torch.randn(outputs, size[1] + more, 1, 1), [torch.randn(outputs)] * biased

    def call(function):
        return lambda weight, *rest: function(rest[biased:], weight, rest[0] if biased else None)

    formula = lambda parts, weight, bias: pointwise.reference(weight, bias, *parts)  # noqa: E731
    assert_operator(call(pointwise.pointwise), call(formula), weight, *bias, *parts)


@EXAMPLES
@given(
    size=MAPS,
    width=st.integers(1, 20),
    chunks=st.integers(1, 3),
    biased=st.booleans(),
    training=st.booleans(),
)
def test_pointwise_norm_gelu(size, width, chunks, biased, training):
    training = training and size[0] * size[2] * size[3] > 8  # else the variance may be next to nothing
    outputs = width * chunks
    parts = [torch.randn(size), torch.randn(size[0], 3, *size[2:])]
    weight, bias = torch.randn(outputs, size[1] + 3, 1, 1), [torch.randn(outputs)] * biased
    *affine, mean, variance = norm_arguments(outputs)

    def function(weight, *rest):
        conv = SimpleNamespace(weight=weight, bias=rest[0] if biased else None, out_channels=outputs)
        norm = norm_by(*rest[biased : 2 + biased], mean.clone(), variance.clone(), training)
        outs = pointwise.pointwise_norm_gelu(rest[2 + biased :], conv, norm, chunks)
        assert_statistics(norm, mean, variance, pointwise.reference(weight, conv.bias, *rest[2 + biased :]))
        return outs

    def formula(weight, *rest):
        x = pointwise.reference(weight, rest[0] if biased else None, *rest[2 + biased :])
        statistics = () if training else (mean, variance)
        return norm_gelu.reference(x, *rest[biased : 2 + biased], *statistics, eps=1e-5).chunk(chunks, 1)

    assert_operator(function, formula, weight, *bias, *affine, *parts, values=1e-3)


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12)),
    patches=st.integers(1, 7),
    strip_width=st.sampled_from([1, 3, 5]),
    row=st.booleans(),
    bias_map=st.booleans(),
    positioned=st.booleans(),
)
def test_strip_layer(size, patches, strip_width, row, bias_map, positioned):
    images, channels, lines, tokens = size
    shape = (channels * patches, lines, tokens) if row else (channels * patches, tokens, lines)
    x, weight = torch.randn(images, *shape), torch.randn(patches, strip_width, tokens, tokens)
    bias = torch.randn(shape) if bias_map else torch.randn(patches, tokens)

    def function(x, weight, bias, position=None):
        layer = SimpleNamespace(weight=weight, bias=bias, axis='row' if row else 'column')
        return strip_layer.strip_layer(x, layer, position)

    def formula(x, weight, bias, position=None):
        return strip_layer_by_formula(x, weight, bias, row, position)

    assert_operator(function, formula, x, weight, bias, *[torch.randn(shape)] * positioned)


@EXAMPLES
@given(tokens=st.sampled_from([29, 57]), row=st.booleans())
def test_strip_layer_of_many_tokens(tokens, row):
    """So many that their products are taken in pieces."""
    shape = (3, 5, tokens) if row else (3, tokens, 5)
    x, weight, bias = torch.randn(1, *shape), torch.randn(3, 3, tokens, tokens), torch.randn(3, tokens)
    close(
        operators.strip_layer(x, weight, bias, row),
        strip_layer_by_formula(x.double(), weight.double(), bias.double(), row),
    )


def test_strip_layer_of_a_single_patch():
    """Whose weights may be of any stride along the patches."""
    weight, bias, x = torch.randn(1, 3, 5, 5), torch.randn(1, 5), torch.randn(2, 20, 4, 5)
    strange = weight.as_strided(weight.shape, (1, 25, 5, 1))
    close(
        operators.strip_layer(x, strange, bias, True),
        strip_layer_by_formula(x.double(), weight.double(), bias.double(), True),
    )


def local_arguments(channels, hidden):
    return [
        *(torch.randn(channels, 1, 7, 3), torch.randn(channels, 1, 3, 7)),
        *(torch.randn(hidden, channels, 1, 1), torch.randn(hidden)),
        *(torch.randn(3 * channels, hidden, 1, 1) / hidden, torch.randn(3 * channels)),
    ]


@EXAMPLES
@given(size=MAPS, hidden=st.integers(1, 5))
def test_local_strips(size, hidden):
    tensors = torch.randn(size), *local_arguments(size[1], hidden)
    assert_operator(local_strips.local_strips, local_strips.reference, *tensors)


def mlp_arguments(channels, hidden, outputs, norm='both', beta=True):
    """Those of the operator after x; LayerNorm with weight and bias, one of them or neither."""
    return [
        torch.rand(channels) + 0.5 if norm in ('both', 'weight') else None,
        torch.randn(channels) if norm in ('both', 'bias') else None,
        1e-3,
        *(torch.randn(hidden, channels), torch.randn(hidden)),
        *(torch.randn(hidden), torch.randn(hidden) if beta else None, 1e-4),
        *(torch.randn(outputs, hidden), torch.randn(outputs)),
    ]


@settings(max_examples=20)
@given(
    size=MAPS.filter(lambda size: size[1] > 1),  # LayerNorm of a single channel has no gradient but rounding
    hidden=st.integers(1, 40),
    outputs=st.integers(1, 20),
    norm=st.sampled_from(['both', 'weight', 'bias', 'none']),
    beta=st.booleans(),
)
def test_channel_mlp(size, hidden, outputs, norm, beta):
    arguments = torch.randn(size), *mlp_arguments(size[1], hidden, outputs, norm, beta)

    def call(function):
        def run(*tensors):
            tensors = iter(tensors)
            return function(*(next(tensors) if isinstance(old, torch.Tensor) else old for old in arguments))

        return run

    def function(x, norm_weight, norm_bias, norm_eps, expand, expand_bias, gamma, beta, eps, reduce, reduce_bias):
        norm = SimpleNamespace(weight=norm_weight, bias=norm_bias, eps=norm_eps)
        grn = SimpleNamespace(gamma=gamma, beta=beta, eps=eps)
        first, last = (SimpleNamespace(weight=w, bias=b) for w, b in ((expand, expand_bias), (reduce, reduce_bias)))
        return channel_mlp.channel_mlp(x, norm, first, grn, last)

    assert_operator(call(function), call(channel_mlp.reference), *flat(arguments))


def axis_layouts():
    """Length, extent, count and stride of windows, of which at most two overlap; the last one may be moved back."""

    def axis(extent, count, overlap, back):
        stride = max(extent - overlap, (extent + 1) // 2)
        length = (count - 1) * stride + extent - min(back, 2 * stride - extent, stride - 1)
        return (length if count > 1 else extent), extent, count, stride

    coinciding = st.just((3, 1, 4, 1))
    return st.builds(axis, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2)) | coinciding


@EXAMPLES
@given(images=st.integers(1, 3), channels=st.integers(1, 20), rows=axis_layouts(), columns=axis_layouts())
def test_windows(images, channels, rows, columns):
    size, extent, counts, strides = (list(pair) for pair in zip(rows, columns))
    places = counts, strides
    assert_operator(
        lambda x: windows.split_windows(x, extent, *places),
        lambda x: formulas_of_windows.split_windows(x, extent, *places),
        torch.randn(images, channels, *size),
        gradients=1e-4,
    )
    assert_operator(
        lambda x: windows.merge_windows(x, size, *places),
        lambda x: formulas_of_windows.merge_windows(x, size, *places),
        torch.randn(images * counts[0] * counts[1], channels, *extent),
        gradients=1e-4,
    )


# Fused stages.


def block_tensors(channels, extent, patches=2, strip_width=3, hidden=None):
    half, (height, width), hidden = channels // 2, extent, hidden or 3 * channels
    return [
        *norm_arguments(channels),
        torch.randn(channels, 1, 3, 3) / 3,
        *(torch.randn(channels, channels, 1, 1) / channels**0.5, torch.randn(channels)),
        *(torch.randn(patches, strip_width, width, width) / 3, torch.randn(half, height, width)),
        *(torch.randn(half, 2 * half, 1, 1) / channels**0.5, torch.randn(half)),
        *(torch.randn(patches, strip_width, height, height) / 3, torch.randn(half, height, width)),
        *local_arguments(half, half),
        torch.randn(channels, 3 * half, 1, 1) / channels,
        torch.randn(channels, 1, 7, 7) / 7,
        *(torch.randn(hidden, channels) / channels**0.5, torch.randn(hidden), torch.randn(hidden)),
        *(torch.randn(channels, hidden) / hidden, torch.randn(channels)),
    ]


def assert_stage(blocks, x, extent, counts, strides):
    eps = [[1e-5, 1e-5 * (i + 1), 1e-6] for i in range(len(blocks))]
    got = torch.classes.mmstrip.Stage(blocks, eps, torch.float32).run(x, counts, strides)
    expected = stage(x.double(), [[t.double() for t in block] for block in blocks], eps, (extent, counts, strides))
    close(got, expected, 1e-3)
    return got


@settings(max_examples=15)
@given(
    images=st.integers(1, 5),
    half=st.sampled_from([2, 4, 10, 18]),
    depth=st.integers(1, 3),
    rows=axis_layouts(),
    columns=axis_layouts(),
)
def test_stage(images, half, depth, rows, columns):
    size, extent, counts, strides = (list(pair) for pair in zip(rows, columns))
    blocks = [block_tensors(2 * half, extent) for _ in range(depth)]
    assert_stage(blocks, torch.randn(images, 2 * half, *size), extent, counts, strides)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('images', [1, 3, 16])
def test_stage_on_any_number_of_threads(images, set_threads):
    """Images go side by side where there are enough of them."""
    blocks, x = [block_tensors(8, (14, 14)) for _ in range(3)], torch.randn(images, 8, 14, 14)
    results = []
    for threads in (1, 2, 8):
        set_threads(threads)
        results.append(assert_stage(blocks, x, [14, 14], [1, 1], [0, 0]))
    for result in results[1:]:
        close(result, results[0], 1e-5)


def put(blocks, block, place, value):
    blocks[block][place] = value


# What makes packed weights those of other tensors; blocks are lists of tensors.
REPACKED = {
    **{f'tensor {place} in place': lambda b, i=place: b[1][i].flatten()[1:2].fill_(3) for place in range(26)},
    **{f'another tensor {place}': lambda b, i=place: put(b, 1, i, b[1][i].clone()) for place in range(26)},
    'another view of the same memory': lambda b: put(b, 0, 0, b[0][0][:]),
    'a write in inference mode': torch.inference_mode()(lambda b: b[0][21].add_(1)),
    'a write to data': lambda b: b[0][21].data.add_(1),
    'other strides of the same memory': lambda b: setattr(b[0][5], 'data', b[0][5].data.transpose(0, 1)),
    'other data': lambda b: setattr(b[0][19], 'data', b[0][19].clone()),
    'memory that is gone': lambda b: b[0][19].untyped_storage().resize_(0),
    'a block less': lambda b: b.pop(),
    'a block more': lambda b: b.append(b[0]),
    'a tensor less': lambda b: b[1].pop(),
}


@pytest.mark.parametrize('change', REPACKED)
def test_packed_weights_are_those_of_the_tensors(change):
    blocks = [block_tensors(8, (3, 4)) for _ in range(2)]
    packed = torch.classes.mmstrip.Stage(blocks, [[1e-5, 1e-5, 1e-6]] * 2, torch.float32)
    assert packed.is_current(blocks) and packed.is_current([list(block) for block in blocks])
    REPACKED[change](blocks)
    assert not packed.is_current(blocks)


@torch.inference_mode()
def test_packed_weights_of_tensors_of_inference_mode():
    blocks = [block_tensors(8, (3, 4))]
    packed = torch.classes.mmstrip.Stage(blocks, [[1e-5, 1e-5, 1e-6]], torch.float32)
    assert packed.is_current(blocks)
    blocks[0][21].mul_(2)
    assert not packed.is_current(blocks)


def test_an_error_in_one_thread_ends_a_stage(set_threads):
    packed = torch.classes.mmstrip.Stage([block_tensors(8, (14, 14))] * 2, [[1e-5, 1e-5, 1e-6]] * 2, torch.float32)
    for threads in (1, 4):
        set_threads(threads)
        for size in ((13, 14), (14, 15)):
            with pytest.raises(RuntimeError, match='does not fit|must have'):
                packed.run(torch.randn(8, 8, *size), [1, 1], [0, 0])


# Layouts, threads and bad arguments, of one example of each operator.


def cases():
    """Arguments of each operator; what is trained, and so written, comes twice."""
    x, grad, windows = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5), torch.randn(8, 6, 3, 3)
    square, layers, local = torch.randn(6, 9, 1, 1), mlp_arguments(6, 11, 5), local_arguments(6, 4)
    norm, kernel, parts = [*norm_arguments(6), False, 0.1, 1e-5], torch.randn(6, 1, 3, 5), [x, torch.randn(2, 3, 4, 5)]
    trained = [*norm[:4], True, *norm[5:]]
    strips, biases, position = torch.randn(3, 3, 5, 5), torch.randn(3, 5), torch.randn(6, 4, 5)
    _, before, values = operators.pointwise_norm_gelu_forward(parts, square, None, *norm, 2)
    chunks = [torch.randn(2, 3, 4, 5) for _ in range(2)]
    saved_local, saved_mlp = operators.local_strips(x, *local)[1:], operators.channel_mlp_forward(x, *layers)[1:]
    yes = [True] * 9
    return {
        'depthwise': [x, kernel],
        'depthwise_backward': [grad, x, kernel, yes[:2]],
        'norm_gelu_depthwise': [x, kernel, *norm],
        'norm_gelu_depthwise (training)': [x, kernel, *trained],
        'norm_gelu_depthwise_backward': [grad, x, kernel, values, True, yes[:4]],
        'pointwise': [parts, square, torch.randn(6)],
        'pointwise_backward': [grad, parts, square, yes[:4]],
        'pointwise_norm_gelu': [parts, square, torch.randn(6), *norm, 2],
        'pointwise_norm_gelu_forward (training)': [parts, square, torch.randn(6), *trained, 2],
        'pointwise_norm_gelu_backward': [chunks, parts, square, before, values, True, yes[:6]],
        'strip_layer': [x, strips, biases, True, position],
        'strip_layer_backward': [grad, x, strips, True, False, position, yes[:4]],
        'local_strips': [x, *local],
        'local_strips_backward': [grad, x, *local[:3], local[4], *saved_local, yes[:7]],
        'channel_mlp': [x, *layers],
        'channel_mlp_forward': [x, *layers],
        'channel_mlp_backward': [torch.randn(2, 5, 4, 5), x, *layers[:2], *layers[3:9], *saved_mlp, yes],
        'split_windows': [x, [3, 3], [2, 2], [1, 2]],
        'merge_windows': [windows, [4, 5], [2, 2], [1, 2]],
    }


torch.manual_seed(0)
CASES = cases() if REASON is None else {}


def copied(value):
    if isinstance(value, list):
        return [copied(one) for one in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def replaced(name, place, change):
    """Arguments of a case, of which all tensors in one place are changed."""
    arguments = copied(CASES[name])
    old = arguments[place]
    arguments[place] = [change(one) for one in old] if isinstance(old, list) else change(old)
    return arguments


def operator(name):
    return getattr(operators, name.split()[0])


def results(name, arguments):
    """What an operator gives, and its arguments after it, as running statistics are written."""
    return flat([operator(name)(*arguments), arguments])


def places(name):
    return [place for place, argument in enumerate(CASES[name]) if flat(argument)]


def argument_name(name, place):
    return operator(name).default._schema.arguments[place].name


def spread(tensor):
    wide = torch.full((*tensor.shape, 2), torch.nan)
    wide[..., 0] = tensor
    return wide[..., 0]


def reversed_dims(tensor):
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def shifted(tensor):
    """Amid other memory, not aligned."""
    wide = torch.full((*tensor.shape[:1], tensor[0].numel() + 5), torch.nan)
    wide[:, 1:-4] = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    return wide[:, 1:-4].unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else wide[:, 1]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def of_one_value(tensor):
    return tensor.flatten()[:1].abs().expand(tensor.shape)


def of_one_row(tensor):
    return tensor[:1].abs().expand_as(tensor)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('layout', [spread, reversed_dims, shifted, channels_last, of_one_value, of_one_row])
def test_any_layout(name, layout):
    """As of dense tensors of the same values. Statistics cannot be written to expanded ones."""
    for place in places(name):
        if '(training)' in name and argument_name(name, place) in ('mean', 'variance') and 'one' in layout.__name__:
            with pytest.raises(RuntimeError, match='single memory location'):
                results(name, replaced(name, place, layout))
            continue
        dense = results(name, replaced(name, place, lambda tensor: layout(tensor).clone().contiguous()))
        for got, value in zip(results(name, replaced(name, place, layout)), dense):
            close(got, value)


@pytest.mark.parametrize('name', CASES)
def test_any_number_of_threads(name, set_threads):
    found = []
    for threads in (1, 2, 8):
        set_threads(threads)
        found.append(results(name, copied(CASES[name])))
    for result in found[1:]:
        for got, value in zip(result, found[0]):
            close(got, value, 1e-5)


def test_statistics_are_seen_to_change():
    for training in (True, False):
        name = 'norm_gelu_depthwise' + ' (training)' * training
        arguments = copied(CASES[name])
        operator(name)(*arguments)
        assert [tensor._version for tensor in arguments[4:6]] == [int(training)] * 2


@pytest.mark.parametrize('name', CASES)
def test_tensors_are_checked(name):
    changes = {
        'float32': torch.Tensor.double,
        'shape': lambda tensor: tensor[None, None],
        'shape|empty': lambda tensor: tensor[..., :0],
    }
    for place in places(name):
        for message, change in changes.items():
            arguments = replaced(name, place, change)
            with pytest.raises(RuntimeError, match=f'{argument_name(name, place)}.*({message})'):
                operator(name)(*arguments)


def resized(dim, difference):
    def change(tensor):
        size = [*tensor.shape]
        size[dim % len(size)] = max(size[dim % len(size)] + difference, 0)
        return torch.rand(size)

    return change


CHANGES = [
    *(resized(dim, by) for dim in range(4) for by in (-1, 1, 16)),
    lambda tensor: tensor[:1],
    lambda t: t[..., 0],
]


@settings(max_examples=150)
@given(data=st.data())
def test_wrong_shapes_are_refused_or_harmless(data):
    """Nothing is read or written beyond memory, which `make sanitize` would see."""
    name = data.draw(st.sampled_from(list(CASES)))
    arguments = copied(CASES[name])
    for _ in range(data.draw(st.integers(1, 2))):
        place, change = data.draw(st.sampled_from(places(name))), data.draw(st.sampled_from(CHANGES))
        old = arguments[place]
        with contextlib.suppress(IndexError):
            arguments[place] = [change(old[0]), *old[1:]] if isinstance(old, list) else change(old)
    with contextlib.suppress(RuntimeError):
        operator(name)(*arguments)


def numbers(name, **changes):
    names = [argument.name for argument in operator(name).default._schema.arguments]
    return [changes.get(key, value) for key, value in zip(names, copied(CASES[name]))]


MAPS_OF_OPERATORS = ('x', 'grad', 'u', 'parts', 'grads')
VECTORS = ('expand_bias', 'gamma', 'beta', 'norm_weight', 'norm_bias', 'reduce_bias')
BAD_ARGUMENTS = [
    *(('depthwise', 'weight', torch.ones(6, 1, *kernel)) for kernel in ((2, 3), (3, 2), (3, 9), (0, 3))),
    ('depthwise_backward', 'weight', torch.ones(6, 1, 2, 3)),
    ('norm_gelu_depthwise', 'variance', torch.ones(5)),
    ('norm_gelu_depthwise (training)', 'variance', torch.ones(5)),
    ('norm_gelu_depthwise_backward', 'norm', torch.ones(4, 5)),
    *(('strip_layer', 'weight', torch.ones(3, width, 5, 5)) for width in (0, 2)),
    *(('strip_layer', 'weight|bias', torch.ones(*shape)) for shape in ((4, 3, 5, 5), (3, 3, 4, 4), (3, 3, 7, 7))),
    *(('strip_layer', 'bias', torch.ones(*shape)) for shape in ((5, 3), (3, 4), (6, 5, 4), (15,))),
    *(('strip_layer', 'position', torch.ones(*shape)) for shape in ((6, 5, 4), (1, 4, 5))),
    ('strip_layer_backward', 'position', torch.ones(6, 5, 4)),
    *(('pointwise', 'weight', torch.ones(*shape)) for shape in ((6, 9), (6, 8, 1, 1), (6, 9, 3, 3), (0, 9, 1, 1))),
    ('pointwise', 'bias', torch.ones(5)),
    ('pointwise', 'parts', []),
    ('pointwise', 'parts', [torch.ones(2, 6, 4, 5), torch.ones(2, 3, 5, 4)]),
    ('pointwise_backward', 'required', [True] * 3),
    ('pointwise_norm_gelu_forward (training)', 'bias', torch.ones(5)),
    ('pointwise_norm_gelu_backward', 'norm', torch.ones(4, 5)),
    ('pointwise_norm_gelu_backward', 'required', [True] * 7),
    ('pointwise_norm_gelu_backward', 'grads', []),
    ('pointwise_norm_gelu_backward', 'grads', [torch.ones(2, 6, 4, 5)] * 2),
    *(('pointwise_norm_gelu', 'chunks', chunks) for chunks in (-1, 0, 4, 7)),
    *(('pointwise_norm_gelu_forward (training)', 'chunks', chunks) for chunks in (-1, 0, 4, 7)),
    *(('local_strips', 'narrow', torch.ones(*shape)) for shape in ((0, 6, 1, 1), (4, 5, 1, 1))),
    ('local_strips', 'broad_bias', torch.ones(17)),
    ('local_strips_backward', 'narrow', torch.ones(4, 5, 1, 1)),
    *((name, vector, torch.ones(10)) for name in ('channel_mlp', 'channel_mlp_forward') for vector in VECTORS),
    *(('channel_mlp', 'reduce', torch.ones(*shape)) for shape in ((11, 5), (5, 12), (0, 11))),
    ('channel_mlp_backward', 'gamma', torch.ones(10)),
    *(('split_windows', 'extent', value) for value in ([5, 3], [0, 3], [3, 6], [-1, 3])),
    *(('split_windows', 'counts', value) for value in ([0, 2], [2, -1], [2, 9], [1, 2])),
    *(('split_windows', 'strides', value) for value in ([-1, 2], [1, 4], [0, 2], [1, 2**62])),
    *(('merge_windows', 'counts', value) for value in ([0, 2], [2, -1], [1, 2], [2, 3])),
    ('merge_windows', 'strides', [1, 1]),
    ('merge_windows', 'x', torch.ones(7, 6, 3, 3)),
]


@pytest.mark.parametrize('name, argument, value', BAD_ARGUMENTS)
def test_arguments_are_checked(name, argument, value):
    """Before maps are copied: expanded ones are far larger than the memory that they are views of."""
    arguments = numbers(name, **{argument.split('|')[0]: value})
    with pytest.raises(RuntimeError, match=argument):
        operator(name)(*arguments)
    if argument in MAPS_OF_OPERATORS:
        return
    for place, key in enumerate(argument.name for argument in operator(name).default._schema.arguments):
        if key in MAPS_OF_OPERATORS:
            maps = [one[:1].expand(2**33, -1, -1, -1) for one in flat([arguments[place]])]
            arguments[place] = maps if isinstance(arguments[place], list) else maps[0]
    with pytest.raises(RuntimeError, match=argument):
        operator(name)(*arguments)


@pytest.mark.parametrize('counts', [(10**8, 1), (1, 2**40), (2**32, 2**32), (2**62, 2**62), (2**63 - 1, 1)])
def test_windows_that_are_not_there_take_no_memory(counts):
    """Nor are their numbers multiplied, which may overflow to 0."""
    with pytest.raises(RuntimeError, match='^counts must be two numbers whose product divides'):
        operators.merge_windows(torch.ones(1, 1, 1, 1), counts, counts, (1, 1), True)
    with pytest.raises(RuntimeError, match='^counts must be at least 1'):
        operators.split_windows(torch.ones(1, 1, 1, 1), (1, 1), counts, (1, 1), True)


def test_bn_in_training_needs_more_than_one_value():
    layer = *norm_arguments(6), True, 0.1, 1e-5
    with pytest.raises(RuntimeError, match='more than one value'):
        operators.norm_gelu_depthwise(torch.ones(1, 6, 1, 1), torch.ones(6, 1, 3, 3), *layer)


@pytest.mark.parametrize('place', range(26))
@pytest.mark.parametrize('change', [torch.Tensor.double, lambda tensor: tensor[None], lambda tensor: tensor[..., :-1]])
def test_tensors_of_a_stage_are_checked(place, change):
    block = block_tensors(8, (3, 4))
    block[place] = change(block[place])
    with pytest.raises(RuntimeError, match=r'must be|must have|does not fit'):
        torch.classes.mmstrip.Stage([block], [[1e-5, 1e-5, 1e-6]], torch.float32)


def test_other_arguments_of_a_stage_are_checked():
    eps, block = [1e-5, 1e-5, 1e-6], block_tensors(8, (3, 4))
    for blocks, constants in (([], []), ([block], [eps, eps]), ([block], [eps[:2]]), ([block[:-1]], [eps])):
        with pytest.raises(RuntimeError, match='blocks|eps'):
            torch.classes.mmstrip.Stage(blocks, constants, torch.float32)
    with pytest.raises(RuntimeError, match='one width'):
        torch.classes.mmstrip.Stage([block, block_tensors(4, (3, 4))], [eps, eps], torch.float32)
    packed = torch.classes.mmstrip.Stage([block], [eps], torch.float32)
    for x in (torch.ones(1, 6, 3, 4), torch.ones(8, 3, 4), torch.ones(0, 8, 3, 4), torch.ones(1, 8, 3, 4).double()):
        with pytest.raises(RuntimeError, match='x must'):
            packed.run(x, [1, 1], [0, 0])
    with pytest.raises(RuntimeError, match='gradient'):
        packed.run(torch.ones(1, 8, 3, 4, requires_grad=True), [1, 1], [0, 0])
    with pytest.raises(RuntimeError, match='x must be'):
        packed.run(torch.ones(1, 8, 3, 4).bfloat16(), [1, 1], [0, 0])
    with pytest.raises(RuntimeError, match='type must be float32'):
        torch.classes.mmstrip.Stage([block], [eps], torch.float16)
    for counts, strides in (([1], [0]), ([1, 1], [0]), ([2, 1], [9, 0]), ([1, 1], [0, 0])):
        with pytest.raises(RuntimeError, match='counts|strides|extent|must have'):
            packed.run(torch.ones(1, 8, 5, 4), counts, strides)


# The library.


def test_it_is_that_of_this_cpu():
    (path,) = [path for path in torch.ops.loaded_libraries if '_C_' in path]
    assert f'{extension.variant()}_torch' in path


@pytest.mark.skipif(extension.variant() != 'avx512', reason='this machine runs on AVX2 anyway, or has no AVX2')
def test_values_on_avx2():
    """The other half of the build, with the formulas above."""
    subset = 'depthwise or pointwise or strip_layer or local_strips or channel_mlp or test_stage or of_this_cpu'
    command = 'python', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__, '-k', f'({subset}) and not checked'
    done = run(*command, env={'ATEN_CPU_CAPABILITY': 'avx2'})
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout


class TestALibraryThatIsNotLoaded:
    """One sentence says why."""

    @pytest.mark.skipif('default' in extension.VARIANTS, reason='one library serves all CPUs of this kind')
    def test_a_cpu_without_vectors(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'DEFAULT')
        assert 'need AVX2' in extension.load()

    def test_other_sources(self, monkeypatch):
        monkeypatch.setattr(extension, 'SOURCES', extension.SOURCES[1:])
        assert 'not built for' in extension.load()

    def test_a_damaged_file(self, monkeypatch, tmp_path):
        path = tmp_path / (extension.library_name(extension.variant()) + EXTENSION_SUFFIXES[0])
        path.write_text('no library')
        monkeypatch.setattr(extension, 'HERE', tmp_path)
        assert 'could not be loaded' in extension.load()
