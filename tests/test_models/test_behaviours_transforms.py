"""What PyTorch makes of a model: derivatives, functional calls, graphs, other dtypes and devices."""

import copy
from collections import Counter

import pytest
import torch
from helpers import operators_of
from helpers.behaviours import (
    BOXES,
    MODES,
    SecondStage,
    assert_close,
    assert_matches_float64,
    backbone,
    called_modules,
    float64_copy,
    float64_outputs,
    images,
    loss_of,
    maps_of,
    module_of_block,
    numbered,
    outputs_of,
    unchanged_outputs,
)
from mmcv.cnn.bricks import DropPath
from torch.autograd import forward_ad
from torch.autograd.functional import hvp, jacobian, vhp
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmstrip

WINDOWED = (2, 3, 32, 40)  # wider than the windows


@pytest.mark.parametrize('mode', MODES)
def test_functional_calls_use_what_they_are_given(mode):
    """Twice with different ones; gradients go there, and the model's own are used again."""
    model = backbone(mode)
    for seed in (1, 2):
        other = backbone(mode, seed)
        given = {name: tensor.detach().clone().requires_grad_() for name, tensor in other.named_parameters()}
        with torch.no_grad():
            maps = numbered(functional_call(model, given | dict(copy.deepcopy(other).named_buffers()), (images(),)))
        assert_close(maps, maps_of(unchanged_outputs(mode, seed=seed)))
        maps = functional_call(model, given | dict(copy.deepcopy(other).named_buffers()), (images(),))
        grads = torch.autograd.grad(loss_of(maps), list(given.values()))
        expected = float64_outputs(other.requires_grad_(), images(), gradients=True)
        got = {f'grad of {name}': gradient for name, gradient in zip(given, grads)}
        assert_close({**numbered(maps), **got}, {name: expected[name] for name in (*numbered(maps), *got)})
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_close(outputs_of(model, images()), unchanged_outputs(mode))


def loss_by(model):
    return lambda x: loss_of(model(x)).square() / 100


def along(model, x):
    """Some outputs as a function of a few numbers, which are added to the images."""
    direction = images(3, *x.shape, seed=1).to(x)
    return lambda steps: model(x + torch.tensordot(steps, direction, 1))[-1].flatten()[::17]


def gradients_of_each_sample(model, x):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    loss = lambda parameters, x: loss_of(functional_call(model, parameters, (x[None],)))  # noqa: E731
    return vmap(grad(loss), in_dims=(None, 0))(parameters, x)


def stacked_models(model, x):
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    return vmap(lambda *state: functional_call(model, state, (x,)))(*stack_module_state([model, other]))


def hessian_of_a_sum(model, x):
    function = along(model, x)
    return hessian(lambda steps: function(steps).pow(3).sum())(x.new_zeros(3))


def dual_numbers(model, x):
    with forward_ad.dual_level():
        maps = model(forward_ad.make_dual(x, images(*x.shape, seed=1).to(x)))
        return [forward_ad.unpack_dual(feature).tangent for feature in maps]


TRANSFORMS = {
    'grad': lambda model, x: grad(loss_by(model))(x),
    'gradients of each sample': gradients_of_each_sample,
    'vmap': lambda model, x: vmap(lambda x: model(x[None]))(x),
    'stacked models': stacked_models,
    'jvp': lambda model, x: jvp(model, (x,), (images(*x.shape, seed=1).to(x),)),
    'vjp': lambda model, x: vjp(loss_by(model), x)[1](torch.ones((), dtype=x.dtype)),
    'jacrev': lambda model, x: jacrev(along(model, x))(x.new_zeros(3)),
    'jacfwd': lambda model, x: jacfwd(along(model, x))(x.new_zeros(3)),
    'hessian': hessian_of_a_sum,
    'dual numbers': dual_numbers,
    'jacobian': lambda model, x: jacobian(along(model, x), x.new_zeros(3), vectorize=True),
    'hvp': lambda model, x: hvp(loss_by(model), x, images(*x.shape, seed=1).to(x)),
    'vhp': lambda model, x: vhp(loss_by(model), x, images(*x.shape, seed=1).to(x)),
}


@pytest.mark.parametrize('mode', MODES[1:])
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_transforms(transform, mode):
    """With gradients of parameters, and in the deploy form without."""
    results = []
    model = backbone(mode).requires_grad_(mode == 'eval')
    for one, x in ((model, images(*WINDOWED)), (float64_copy(model), images(*WINDOWED).double())):
        with torch.set_grad_enabled(transform not in ('vmap', 'stacked models', 'jvp', 'dual numbers')):
            leaves = torch.utils._pytree.tree_leaves(TRANSFORMS[transform](one, x))
        results.append({f'grad {i}': leaf.detach() for i, leaf in enumerate(leaves)})
    assert_close(*results, tolerance=1e-3 if transform == 'hessian' else 1e-4)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_gradient_penalty(mode, with_cp):
    """The norm of the image's gradient, trained on."""

    def penalty(model, x):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
        gradient.square().mean().backward()
        return {f'grad of {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = backbone(mode, with_cp=with_cp)
    got = penalty(model, images())
    reference = float64_copy(backbone(mode))
    assert_close(got, penalty(reference, images().double()), tolerance=1e-3)
    for one, other in zip(model.buffers(), reference.buffers()):  # checkpoints count a batch once
        torch.testing.assert_close(one.to(other), other, rtol=1e-4, atol=1e-5)


VARIANTS = {
    'as its windows': ({}, (32, 32)),
    'in windows': ({}, (57, 41)),
    'padded': (dict(img_size=64), (56, 32)),
    'in parallel': (dict(cascade=False), (57, 41)),
    'with GN': (dict(norm_cfg=dict(type='GN', num_groups=2)), (32, 32)),
    'by LSMM': (dict(branches='lsmm'), (32, 32)),
    'by CGSMM': (dict(branches='cgsmm'), (57, 41)),
    'of 24 channels': (dict(arch=dict(embed_dims=24, depths=(1, 1, 1, 1))), (32, 32)),
    'of wider strips': (dict(strip_width=5), (57, 41)),
    'of one patch': (dict(num_patches=1), (32, 32)),
    'with checkpoints': (dict(with_cp=True), (32, 32)),
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('mode', MODES)
def test_values_and_gradients(mode, variant):
    """With gradients of all, of images alone and, in evaluation, without."""
    arguments, size = VARIANTS[variant]
    x = images(2, 3, *size)
    assert_matches_float64(backbone(mode, **arguments), x, gradients=True)
    assert_matches_float64(backbone(mode, **arguments).requires_grad_(False), x, gradients=True)
    assert_matches_float64(backbone(mode, **arguments).eval(), x, gradients=False)


class TestBackward:
    def test_twice_through_one_graph(self):
        """What is saved for backward stays as it is."""
        model = backbone('train')
        loss = loss_of(model(images()))
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, list(model.parameters()))))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_weight_changed_before_it_is_an_error(self, mode):
        """As of PyTorch's own layers."""
        for name in ('strip_mixing.depthwise.2', 'strip_mixing.fuse', 'channel_mixing.fc2', BOXES[0]):
            model = backbone(mode)
            loss = loss_of(model(images()))
            with torch.no_grad():
                module_of_block(model, name).weight.mul_(2)
            with pytest.raises(RuntimeError, match='modified by an inplace operation'):
                loss.backward()

    def test_steps_within_it(self):
        """Each parameter is changed as soon as its gradient is there."""

        @torch.no_grad()
        def step(parameter):
            parameter.sub_(parameter.grad, alpha=1e-3)

        model = backbone('train')
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        assert_close(outputs_of(model, images()), unchanged_outputs('train'))

    @pytest.mark.parametrize('mode', MODES)
    def test_with_hooks_on_what_is_saved(self, mode):
        """Saved tensors that are packed and unpacked, as those that go to disk."""
        packed = []
        pack = lambda tensor: packed.append(tensor.shape) or tensor.detach().clone()  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            got = outputs_of(backbone(mode), images(), gradients=True)
        assert_close(got, float64_outputs(backbone(mode), images(), gradients=True))
        assert packed


def exported(strict):
    def export(stage, x):
        batch = {0: torch.export.Dim('batch', min=2, max=64)}
        return torch.export.export(stage, (x,), dynamic_shapes=(batch,), strict=strict).module()

    return export


def compiled(stage, x):
    torch._dynamo.reset()
    return torch.compile(stage, fullgraph=True, backend='eager')


GRAPHS = {
    'trace': lambda stage, x: torch.jit.trace(stage, x, check_trace=False),
    'export': exported(strict=False),
    'strict export': exported(strict=True),
    'compile': compiled,
    'make_fx': lambda stage, x: make_fx(stage)(x),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('mode', MODES[1:])
@pytest.mark.parametrize('how', GRAPHS)
def test_graphs_are_of_the_reference(how, mode):
    """And serve other inputs."""
    stage, x = SecondStage(mode), SecondStage.input(seed=1)
    with torch.no_grad():
        graph = GRAPHS[how](stage, SecondStage.input())
        assert_close(numbered(graph(x)), float64_outputs(stage, x))
        assert not operators_of(lambda: graph(x))


@pytest.mark.parametrize('windowed', [False, True])
def test_training_is_compiled_in_one_graph(windowed):
    model, x = backbone('train'), images(*WINDOWED) if windowed else images()
    expected = float64_outputs(model, x)
    got = outputs_of(compiled(model, x), x)
    assert_close({name.replace('_orig_mod.', ''): value for name, value in got.items()}, expected)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), named=None):
        SEEN.update([getattr(function, '__name__', '')])
        return function(*arguments, **(named or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        SEEN.update([str(function)])
        return function(*arguments, **(named or {}))


class Traced(torch.Tensor):
    """A tensor that other libraries derive from Tensor."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        SEEN.update([getattr(function, '__name__', '')])
        return super().__torch_function__(function, types, arguments, named)


SEEN = Counter()


class TestInterception:
    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('interceptor', [Functions, Dispatched])
    def test_modes_see_the_layers(self, interceptor, mode):
        SEEN.clear()
        with interceptor():
            got = outputs_of(backbone(mode), images())
        assert not any('mmstrip' in name for name in SEEN)
        assert max(SEEN['gelu'], SEEN['aten.gelu.default']) >= 4 * 5
        assert_close(got, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_tensors_of_another_class(self, mode):
        SEEN.clear()
        with torch.no_grad():
            maps = backbone(mode)(images().as_subclass(Traced))
        assert all(type(feature) is Traced for feature in maps) and SEEN['gelu'] >= 4 * 5
        got = numbered([feature.as_subclass(torch.Tensor) for feature in maps])
        assert_close(got, maps_of(unchanged_outputs(mode)))

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
    def test_global_hooks_fire(self, kind, mode):
        model, counts = backbone(mode), Counter()
        with getattr(global_hooks, f'register_module_{kind}_hook')(lambda module, *_: counts.update([module])):
            got = outputs_of(model, images(), gradients=mode == 'train' or 'backward' in kind)
        expected = {module: 2 if isinstance(module, DropPath) else 1 for _, module in called_modules(model)}
        assert counts == expected
        assert_close({key: got[key] for key in unchanged_outputs(mode)}, unchanged_outputs(mode))


class TestMaps:
    @pytest.mark.parametrize('mode', MODES)
    def test_meta(self, mode):
        model = backbone(mode).to('meta')
        maps = model(torch.empty(2, 3, 40, 48, device='meta'))
        assert [tuple(feature.shape) for feature in maps] == [(2, 16, 10, 12), (2, 32, 5, 6), (2, 64, 2, 3)]
        sum(feature.sum() for feature in maps).backward()

    @pytest.mark.parametrize('mode', MODES)
    def test_fake_tensors(self, mode):
        model = backbone(mode)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
            maps = model(fake.from_tensor(images(2, 3, 32, 48)))
        assert [tuple(feature.shape) for feature in maps] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]

    @pytest.mark.parametrize('mode', MODES)
    def test_nan_spreads_as_in_the_reference(self, mode):
        x = images()
        x[0, 1, 13, 20] = torch.nan
        got = outputs_of(backbone(mode).eval(), x)
        for name, value in outputs_of(mmstrip.restore(backbone(mode).eval()), x).items():
            assert value[0].isnan().any() and not value[1].isnan().any()
            assert torch.equal(got[name].isnan(), value.isnan())
            assert_close({'map': got[name][1]}, {'map': value[1]})

    @pytest.mark.parametrize('mode', MODES[1:])
    def test_no_images(self, mode):
        with torch.no_grad():
            maps = backbone(mode)(images(0, 3, 32, 40))
        assert [tuple(feature.shape) for feature in maps] == [(0, 16, 8, 10), (0, 32, 4, 5), (0, 64, 2, 2)]

    def test_one_pixel_is_no_batch(self):
        """BN refuses it in training, as everywhere."""
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            backbone('train', out_indices=(3,))(images(1, 3, 32, 32))

    @pytest.mark.parametrize('mode', MODES)
    def test_other_defaults(self, mode, monkeypatch):
        """New tensors are float64, and what is not written is NaN."""
        expected, x, model = unchanged_outputs(mode), images(), backbone(mode)
        monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
        try:
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
            got = outputs_of(model, x)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
        assert not any(value.dtype == torch.float64 for value in got.values())
        assert_close(got, expected)
