"""Fast forms against plain formulas: values and gradients, whatever the sizes."""

from contextlib import nullcontext

import pytest
import torch
from helpers import STRIP_LAYERS, randomise, small_backbone
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from mmstrip.models import native, ops, plain_ops
from mmstrip.models.channel_mixing import GlobalResponseNorm


@pytest.fixture(scope='module', params=['native', 'python'], autouse=True)
def form(request):
    """Every test runs on the compiled operators, if they are there, and on what stands in for them."""
    if request.param == 'native' and not native.in_use():
        pytest.skip('the operators are not compiled')
    with native.switched_off() if request.param == 'python' else nullcontext():
        yield


def assert_same(name, inputs, *rest, module=None, rtol=1e-4, atol=1e-4):
    """An operation and its plain form give the same, and the same gradients of all inputs (and parameters of a module);
    without gradients too."""
    results = []
    for form in (ops, plain_ops):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = getattr(form, name)(*leaves, *rest)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        leaves += [] if module is None else module.parameters()
        results.append((out, *torch.autograd.grad((out * upstream).sum(), leaves)))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=rtol, atol=atol * max(1, plain.abs().max().item()))
    with torch.no_grad():
        out = getattr(ops, name)(*[tensor.clone() for tensor in inputs], *rest)
    torch.testing.assert_close(out, results[1][0], rtol=rtol, atol=atol * max(1, out.abs().max().item()))


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel=st.sampled_from([(3, 3), (7, 3), (3, 7), (7, 7), (5, 5), (1, 7)]),
    dense=st.booleans(),
)
@settings(max_examples=60)
def test_depthwise(height, width, kernel, dense):
    x = torch.randn(2, 5, height, width)
    x = x.contiguous(memory_format=torch.channels_last) if dense else x
    assert_same('depthwise', [x, torch.randn(5, 1, *kernel)])


@given(**STRIP_LAYERS, bias_map=st.booleans())
@settings(max_examples=60)
@example(tokens=31, lines=9, patches=3, size=2, strip_width=3, axis='row', bias_map=False)
@example(tokens=57, lines=3, patches=1, size=17, strip_width=1, axis='column', bias_map=True)
def test_strip_layer(tokens, lines, patches, size, strip_width, axis, bias_map):
    height, width = (lines, tokens) if axis == 'row' else (tokens, lines)
    x = torch.randn(2, patches * size, height, width)
    weight = torch.randn(patches, strip_width, tokens, tokens)
    bias = torch.randn(patches * size, height, width) if bias_map else torch.randn(patches, tokens)
    position = torch.randn(patches * size, height, width)
    assert_same('strip_layer', [x, weight, bias], axis)
    results = []
    for module in (ops, plain_ops):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, position)]
        out = module.strip_layer(*leaves[:3], axis, leaves[3])
        results.append((out, *torch.autograd.grad((out * x).sum(), leaves)))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4 * max(1, plain.abs().max().item()))


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 17)), dense=st.booleans()
)
@settings(max_examples=30)
def test_local_strips(size, dense):
    channels = size[1]
    x = torch.randn(*size)
    x = x.contiguous(memory_format=torch.channels_last) if dense else x
    kernels = [torch.randn(channels, 1, 7, 3), torch.randn(channels, 1, 3, 7)]
    reweight = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.GELU(), nn.Conv2d(4, 3 * channels, 1))
    assert_same('local_strips', [x, *kernels], reweight, module=reweight)


def norm_of(channels, training=False, kind=nn.BatchNorm2d):
    """With numbers of its own."""
    norm = kind(channels) if kind is nn.BatchNorm2d else kind(1, channels)
    generator = torch.Generator().manual_seed(0)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5, generator)
    return norm.train(training)


def assert_same_with_norm(run, norms, inputs):
    """As assert_same, of outputs ``run(form, norm, *inputs)``; the norms end with the same statistics."""
    results = []
    for form, norm in zip((ops, plain_ops), norms):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        outs = run(form, norm, *leaves)
        loss = sum(((i + 1) * out).square().sum() for i, out in enumerate(outs))
        gradients = torch.autograd.grad(loss, (*leaves, *norm.parameters()))
        with torch.no_grad():
            results.append((*outs, *gradients, *norm.state_dict().values(), *run(form, norm, *inputs)))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * max(1, plain.abs().max().item()))


@given(
    size=st.tuples(st.integers(2, 3), st.integers(1, 20), st.integers(2, 9), st.integers(1, 17)),
    training=st.booleans(),
    kind=st.sampled_from([nn.BatchNorm2d, nn.BatchNorm2d, nn.GroupNorm]),
)
@settings(max_examples=40)
def test_norm_activate_depthwise(size, training, kind):
    norms = [norm_of(size[1], training, kind) for _ in range(2)]

    def run(form, norm, x, weight):
        return [form.norm_activate_depthwise(norm, nn.GELU(), x, weight)]

    assert_same_with_norm(run, norms, [torch.randn(*size), torch.randn(size[1], 1, 3, 3)])


@given(
    size=st.tuples(st.integers(2, 3), st.integers(1, 20), st.integers(2, 9), st.integers(1, 17)),
    training=st.booleans(),
    biased=st.booleans(),
    chunks=st.integers(1, 2),
)
@settings(max_examples=40)
def test_pointwise_norm_activate(size, training, biased, chunks):
    norms = [norm_of(6, training) for _ in range(2)]
    parts = [torch.randn(*size), torch.randn(size[0], 3, *size[2:])]

    def run(form, norm, x, y, weight, bias):
        return form.pointwise_norm_activate((x, y), weight, bias if biased else bias * 0, norm, nn.GELU(), chunks)

    assert_same_with_norm(run, norms, [*parts, torch.randn(6, size[1] + 3, 1, 1), torch.randn(6)])


def test_pointwise_without_bias_or_norm():
    """What the deploy form and CGSMM's fusion leave out."""
    x, weight = torch.randn(2, 5, 4, 3), torch.randn(6, 5, 1, 1)
    for norm in (nn.Identity(), norm_of(6)):
        for context in (nullcontext, torch.no_grad):
            with context():
                outs = [
                    form.pointwise_norm_activate((x,), weight, None, norm, nn.GELU())[0] for form in (ops, plain_ops)
                ]
            torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_gelu_far_out():
    """Steep, flat and in between; nothing is left where GELU is 0."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-1e4, -100.0, 100.0, 1e4])]).requires_grad_()
    norm = nn.BatchNorm2d(1, eps=0.0).eval()
    results = []
    for form in (ops, plain_ops):
        out = form.norm_activate_depthwise(norm, nn.GELU(), x.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1))
        results.append((out.flatten(), *torch.autograd.grad(out.sum(), x)))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize('outputs', [7, 37, 64])
def test_pointwise_sums_over_parts(outputs):
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    weight, bias, residual = torch.randn(outputs, 9, 1, 1), torch.randn(outputs), torch.randn(2, outputs, 5, 4)
    results = []
    for module in (ops, plain_ops):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, weight, bias, residual)]
        out = module.pointwise(leaves[:2], *leaves[2:])
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        with torch.no_grad():
            results.append((out, *gradients, module.pointwise((x, y), weight, bias, residual.clone())))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-3)


@given(size=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)), channels=st.integers(1, 9))
@settings(max_examples=30)
def test_gelu_response_norm_linear(size, channels):
    x, gamma = torch.randn(*size, channels), torch.randn(channels)
    weight, bias = torch.randn(4, channels), torch.randn(4)
    results = []
    for module in (ops, plain_ops):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gamma, weight, bias)]
        out = module.gelu_response_norm_linear(*leaves[:2], 1e-6, *leaves[2:])
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * max(1, plain.abs().max().item()))
    with torch.no_grad():
        torch.testing.assert_close(ops.gelu_response_norm_linear(x.clone(), gamma, 1e-6, weight, bias), results[1][0])


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 7), st.integers(1, 25)),
    affine=st.booleans(),
    act=st.sampled_from([nn.GELU(), nn.GELU(), nn.SiLU()]),
)
@settings(max_examples=40)
def test_channel_mlp(size, affine, act):
    channels = size[1]
    norm = nn.LayerNorm(channels, elementwise_affine=affine)
    layers = nn.ModuleList([norm, nn.Linear(channels, 2 * channels), act])
    layers += [GlobalResponseNorm(2 * channels), nn.Linear(2 * channels, channels)]
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    if not affine:  # as in the deploy form
        layers[3].beta = None
    assert_same('channel_mlp', [torch.randn(size)], *layers, module=layers, rtol=1e-3)


@pytest.mark.parametrize('images', [1, 3, 8])
@pytest.mark.parametrize('threads', [1, 5, 16])
def test_any_number_of_threads(images, threads):
    """Images side by side or one after the other, rows and columns shared out."""
    before = torch.get_num_threads()
    layers = nn.LayerNorm(24), nn.Linear(24, 200), nn.GELU(), GlobalResponseNorm(200), nn.Linear(200, 130)
    nn.init.ones_(layers[3].gamma)
    try:
        torch.set_num_threads(threads)
        for side in (6, 15):
            x, residual = torch.randn(images, 24, side, side), torch.randn(images, 130, side, side)
            with torch.no_grad():
                results = [form.channel_mlp(x, *layers, residual.clone()) for form in (ops, plain_ops)]
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('parts', [1, 2])
def test_norm_activate(training, parts):
    results = []
    for module in (ops, plain_ops):
        norm = nn.BatchNorm2d(6).train(training)
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor, generator=torch.Generator().manual_seed(0))
        x = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outs = module.norm_activate(norm, nn.GELU(), x, parts)
        loss = sum(((i + 1) * out).square().sum() for i, out in enumerate(outs))
        gradients = torch.autograd.grad(loss, (x, norm.weight, norm.bias))
        results.append((*outs, *gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('arguments', [{}, dict(cascade=False), dict(norm_cfg=dict(type='GN', num_groups=2))])
@pytest.mark.parametrize('size', [(64, 64), (97, 75)])
def test_whole_network(arguments, size):
    """A training step and inference, on maps that are windows, in windows and padded."""
    x = torch.rand(2, 3, *size)
    results = []
    for context in (torch.enable_grad, plain_ops.plain_formulas):
        torch.manual_seed(0)
        model = randomise(small_backbone(out_indices=(0, 1, 2, 3), drop_path_rate=0.0, **arguments))
        with context():
            features = model(x)
            sum(feature.square().mean() for feature in features).backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            model.eval()
            with torch.no_grad():
                results.append((*features, *gradients, *model(x)))
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * max(1, plain.abs().max().item()))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    model = randomise(small_backbone(drop_path_rate=0.0))
    x = torch.rand(2, 3, 64, 64)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', dtype, enabled=enabled):
            out = model(x)[0]
        out.float().square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def test_inference_leaves_its_input_alone():
    """Memory is reused inside of blocks, never that of images or of features given out."""
    model = randomise(small_backbone(out_indices=(0, 1, 2, 3))).eval()
    x = torch.rand(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        first = model(x)
        kept = [feature.clone() for feature in first]
        model(torch.rand_like(x))
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    for feature, copy in zip(first, kept):
        torch.testing.assert_close(feature, copy, rtol=0, atol=0)
