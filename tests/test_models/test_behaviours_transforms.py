"""What PyTorch makes of a model: derivatives, functional calls, graphs, other dtypes and devices, counts."""

import copy
import warnings

import pytest
import torch
from helpers.behaviours import (
    BLOCK,
    BOXES,
    MODES,
    SecondStage,
    assert_changed,
    assert_close,
    assert_matches_float64,
    backbone,
    float64_copy,
    float64_outputs,
    images,
    loss_of,
    module_of_block,
    outputs_of,
    unchanged_outputs,
)
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp, jacobian, vhp
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.func import hessian as func_hessian
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmstrip import ops

pytest_plugins = ['helpers.behaviours']

# Boxes by themselves, with the shape of what they take; a map of 13 x 6 runs in windows.
SHAPES = {
    **dict.fromkeys(('row', 'column', 'position_row', 'position_column'), (2, 16, 4, 4)),
    **dict.fromkeys(('cgsmm', 'lsmm'), (2, 16, 13, 6)),
    'strip_mixing': (2, 32, 13, 6),
    'grn': (2, 5, 3, 96),
    'channel_mixing': (2, 32, 5, 3),
    'block': (2, 32, 4, 4),
    'stage': (2, 32, 6, 4),
}
# Training, and training with the statistics of BN held still.
NORMS = ['batch statistics', 'running statistics']


def box(name, norms=NORMS[0]):
    """A box of its own, and what it takes."""
    model = backbone('train' if norms == NORMS[0] else 'eval')
    if name in ('block', 'stage'):
        module = module_of_block(model, '') if name == 'block' else model.stages[1]
    else:
        module = module_of_block(model, BOXES[name])
    return module, images(*SHAPES[name])


def parameters_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def loss_by(module):
    """A loss as a function of parameters and the input. Running statistics are left as they are."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def loss(parameters, x):
        state = {**{name: buffer.clone() for name, buffer in buffers.items()}, **parameters}
        return loss_of(functional_call(module, state, (x,))).square() / 100

    return loss


def of_all(values):
    """Tensors of a dict, under names that :func:`assert_close` treats as gradients."""
    return {f'grad of {name}': value.detach() for name, value in values.items()}


class TestFunctionalCalls:
    @pytest.mark.parametrize('mode', MODES)
    def test_with_other_parameters(self, mode):
        """Twice with different ones, and then with the model's own."""
        model, others = backbone(mode), [backbone(mode, seed) for seed in (1, 2)]
        results = []
        with torch.no_grad():
            for other in others:
                maps = functional_call(model, parameters_of(other) | dict(other.named_buffers()), (images(),))
                results.append({f'map {i}': feature for i, feature in enumerate(maps)})
        for result, other in zip(results, others):
            assert_close(result, float64_outputs(other.requires_grad_(False), images(), gradients=False))
        assert_close(
            outputs_of(model, images(), gradients=False),
            {k: v for k, v in unchanged_outputs(mode).items() if k.startswith('map')},
        )

    @pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize('mode', ['train', 'eval'])
    def test_with_another_position_table(self, mode, context):
        model = backbone(mode)
        key = f'{BLOCK}.{BOXES["position_row"]}.table'
        for seed in (1, 2):
            table = backbone(seed=seed).get_parameter(key).detach()
            reference = float64_copy(backbone(mode))
            reference.get_parameter(key).data.copy_(table)
            with context():
                maps = functional_call(model, {key: table}, (images(),))
            got = {f'map {i}': feature.detach() for i, feature in enumerate(maps)}
            expected = outputs_of(reference, images().double(), gradients=False)
            assert_close(got, expected)
            assert_changed(expected, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_each_parameter_has_an_effect(self, mode):
        """Given alone, whatever it is."""
        model, other = backbone(mode), backbone(mode, seed=1)
        mine, others = (
            {name: tensor.detach() for name, tensor in one.named_parameters() if name.startswith(BLOCK)}
            for one in (model, other)
        )
        assert len(others) > 20
        with torch.no_grad():
            before = model(images())
            for name, tensor in others.items():
                maps = functional_call(model, {name: tensor}, (images(),))
                moved = max((a - b).abs().max() for a, b in zip(maps, before))
                without_effect = mode == 'train' and name.endswith('project.0.bias')  # BN subtracts it
                assert without_effect or moved > 1e-3, name
            for name, tensor in mine.items():  # each is the model's own
                maps = functional_call(model, {name: tensor.clone()}, (images(),))
                for got, same in zip(maps, before):
                    torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-4, msg=name)

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_gradients_go_to_what_was_given(self, mode):
        model, other = backbone(mode), backbone(mode, seed=1).requires_grad_()
        given = {name: tensor.requires_grad_() for name, tensor in parameters_of(other).items()}
        state = given | dict(other.named_buffers())
        grads = torch.autograd.grad(loss_of(functional_call(model, state, (images(),))), list(given.values()))
        expected = float64_outputs(other, images(), gradients=True)
        got = {f'grad of {name}': tensor for name, tensor in zip(given, grads)}
        assert_close(got, {name: expected[name] for name in got})
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_stacked_models(self):
        """An ensemble in one call (torch.func.stack_module_state)."""
        models = [backbone('eval', seed) for seed in (1, 2, 3)]
        state, x = torch.func.stack_module_state(models), images()
        with torch.no_grad():
            maps = vmap(lambda *state: functional_call(models[0], state, (x,))[-1])(*state)
        for model, feature in zip(models, maps):
            assert_close({'map': feature}, {'map': float64_outputs(model, images())['map 2']})


class TestFunctionTransforms:
    @pytest.mark.parametrize('norms', NORMS)
    @pytest.mark.parametrize('name', SHAPES)
    def test_grad_of_a_box(self, name, norms):
        module, x = box(name, norms)
        got = grad(loss_by(module), argnums=(0, 1))(parameters_of(module), x)
        module = module.double()
        leaves = {name: tensor.requires_grad_() for name, tensor in parameters_of(module).items()}
        x = x.double().requires_grad_()
        expected = torch.autograd.grad(loss_by(module)(leaves, x), [*leaves.values(), x])
        # In float32, PyTorch's own layers are up to 1.5e-4 off on CPUs without AVX-512.
        assert_close(of_all({**got[0], 'x': got[1]}), of_all(dict(zip([*leaves, 'x'], expected))), tolerance=3e-4)

    @pytest.mark.parametrize('mode', MODES)
    def test_grad_of_the_model(self, mode):
        model = backbone(mode)
        got = grad(lambda parameters: loss_by(model)(parameters, images()))(parameters_of(model))
        model = model.double()
        leaves = {name: tensor.requires_grad_() for name, tensor in parameters_of(model).items()}
        expected = torch.autograd.grad(loss_by(model)(leaves, images().double()), list(leaves.values()))
        assert_close(of_all(got), of_all(dict(zip(leaves, expected))))

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_gradients_of_each_sample(self, mode):
        """By vmap, against one after the other."""
        model = backbone(mode)

        def loss(parameters, x):
            return loss_of(functional_call(model, parameters, (x[None],)))

        got = vmap(grad(loss), in_dims=(None, 0))(parameters_of(model), images())
        for i, x in enumerate(images()):
            expected = float64_outputs(model, x[None], gradients=True)
            assert_close(
                {f'grad of {name}': value[i] for name, value in got.items()},
                {name: value for name, value in expected.items() if name in {f'grad of {name}' for name in got}},
            )

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_vmap_of_forward(self, mode):
        model = backbone(mode)
        with torch.no_grad():
            maps = vmap(lambda x: model(x[None]))(images())
        assert_close({f'map {i}': feature[:, 0] for i, feature in enumerate(maps)}, unchanged_outputs(mode))

    @pytest.mark.parametrize('transform', [jacrev, jacfwd])
    @pytest.mark.parametrize('name', SHAPES)
    def test_jacobians_of_a_box(self, name, transform):
        """Of a few outputs by a few numbers that are added to the input."""
        module, x = box(name, NORMS[1])
        direction = images(4, *x.shape, seed=1)

        def function(module, x, direction):
            return lambda steps: module(x + torch.tensordot(steps, direction, 1)).flatten()[::97]

        got = transform(function(module, x, direction))(torch.zeros(4))
        module = module.double()
        expected = jacobian(function(module, x.double(), direction.double()), torch.zeros(4, dtype=torch.float64))
        assert_close({'map': got}, {'map': expected})

    @pytest.mark.parametrize('norms', NORMS)
    @pytest.mark.parametrize('name', SHAPES)
    def test_jvp_of_a_box(self, name, norms):
        """Against finite differences in float64."""
        module, x = box(name, norms)
        tangent = images(*x.shape, seed=1)

        def function(x):  # functorch does not let BN write statistics that it did not make
            return functional_call(module, {name: buffer.clone() for name, buffer in module.named_buffers()}, (x,))

        out, got = jvp(function, (x,), (tangent,))
        assert_close({'map': got}, {'map': finite_difference(float64_copy(module), x, tangent)})
        assert_close({'map': out}, {'map': float64_copy(module)(x.double()).detach()})

    def test_vjp_of_the_model(self):
        model, x = backbone('eval'), images()
        maps, pull = vjp(model, x)
        (got,) = pull(tuple(images(*feature.shape, seed=i) for i, feature in enumerate(maps)))
        model, x = model.double(), x.double().requires_grad_()
        loss = sum((feature * images(*feature.shape, seed=i)).sum() for i, feature in enumerate(model(x)))
        assert_close({'grad': got}, {'grad': torch.autograd.grad(loss, x)[0]})

    def test_hessian_of_a_box(self):
        module, x = box('channel_mixing')
        direction = images(3, *x.shape, seed=1)

        def function(steps):
            kind = steps.dtype
            return loss_of(module(x.to(kind) + torch.tensordot(steps, direction.to(kind), 1))).square()

        got = func_hessian(function)(torch.zeros(3))
        module = module.double()
        assert_close({'map': got}, {'map': hessian(function, torch.zeros(3, dtype=torch.float64))}, tolerance=1e-3)


def finite_difference(module, x, tangent, step=1e-5):
    """The derivative of a float64 module along a direction; running statistics do not matter."""
    x, tangent = x.double(), tangent.double()
    with torch.no_grad():
        return (module(x + step * tangent) - module(x - step * tangent)) / (2 * step)


class TestForwardModeDerivatives:
    @pytest.mark.parametrize('name', SHAPES)
    def test_dual_numbers_through_a_box(self, name):
        module, x = box(name)
        tangent = images(*x.shape, seed=1)
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent)))
        assert_close({'map': out.tangent}, {'map': finite_difference(float64_copy(module), x, tangent)})

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('gradients', [True, False])
    def test_through_the_model(self, mode, gradients):
        model, x = backbone(mode), images()
        tangent = images(seed=1)
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            maps = model(forward_ad.make_dual(x, tangent))
            got = {f'map {i}': forward_ad.unpack_dual(feature).tangent for i, feature in enumerate(maps)}
        assert None not in got.values()
        reference = float64_copy(model)
        with torch.no_grad():
            sides = [reference(x.double() + step * tangent.double()) for step in (1e-6, -1e-6)]
        expected = {f'map {i}': (a - b) / 2e-6 for i, (a, b) in enumerate(zip(*sides))}
        assert_close({name: value.detach() for name, value in got.items()}, expected, tolerance=1e-3)

    def test_of_a_parameter(self):
        """A tangent of a weight in the middle of a box."""
        model = backbone('eval')
        layer = module_of_block(model, 'channel_mixing.fc1')
        weight, tangent = layer.weight.detach(), images(*layer.weight.shape, seed=1)
        with torch.no_grad(), forward_ad.dual_level():
            key = f'{BLOCK}.channel_mixing.fc1.weight'
            maps = functional_call(model, {key: forward_ad.make_dual(weight, tangent)}, (images(),))
            got = {'map': forward_ad.unpack_dual(maps[-1]).tangent}
        model, sides = model.double(), []
        for step in (1e-6, -1e-6):
            layer.weight.data.copy_(weight.double() + step * tangent)
            sides.append(outputs_of(model, images().double())['map 2'])
        assert_close(got, {'map': (sides[0] - sides[1]) / 2e-6}, tolerance=1e-3)


def hessian_product(module, x, how):
    """Product of the Hessian of a loss, of parameters and input, with a fixed vector; by name."""
    x = x.clone().requires_grad_()
    leaves = {**{name: p for name, p in module.named_parameters() if p.requires_grad}, 'x': x}
    vectors = [
        torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i)) for i, leaf in enumerate(leaves.values())
    ]
    loss = loss_of(module(x)).square() / 100
    if how == 'autograd.grad':
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            loss.backward(create_graph=True)
        first = [leaf.grad for leaf in leaves.values()]
        for leaf in leaves.values():
            leaf.grad = None
    product = sum((gradient * vector.to(x.dtype)).sum() for gradient, vector in zip(first, vectors))
    if how == 'autograd.grad':
        second = torch.autograd.grad(product, list(leaves.values()), allow_unused=True, materialize_grads=True)
    else:
        product.backward()
        second = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
    return of_all({**{f'{name}, first': tensor for name, tensor in zip(leaves, first)}, **dict(zip(leaves, second))})


class TestSecondDerivatives:
    HOW = ['autograd.grad', 'backward']

    @pytest.mark.parametrize('how', HOW)
    @pytest.mark.parametrize('mode', MODES)
    def test_hessian_products_of_the_model(self, mode, how):
        model = backbone(mode)
        got = hessian_product(model, images(), how)
        assert_close(got, hessian_product(float64_copy(backbone(mode)), images().double(), how), tolerance=1e-3)

    def test_hessian_products_with_checkpoints(self):
        model = backbone('train', with_cp=True)
        got = hessian_product(model, images(), 'autograd.grad')
        expected = hessian_product(float64_copy(backbone('train')), images().double(), 'autograd.grad')
        assert_close(got, expected, tolerance=1e-3)

    @pytest.mark.parametrize('product', [hvp, vhp])
    def test_of_the_input_by_autograd_functional(self, product):
        module, x = box('block', NORMS[1])
        vector = images(*x.shape, seed=1)
        got = product(lambda x: loss_of(module(x)).square(), x, vector)[1]
        module = module.double()
        expected = product(lambda x: loss_of(module(x)).square(), x.double(), vector.double())[1]
        assert_close({'map': got}, {'map': expected})

    @pytest.mark.parametrize('mode', MODES)
    def test_gradient_penalty(self, mode):
        """The norm of the image's gradient, trained on."""

        def penalty(model, x):
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
            gradient.square().mean().backward()
            return of_all({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

        model = backbone(mode)
        assert_close(penalty(model, images()), penalty(float64_copy(backbone(mode)), images().double()), tolerance=1e-3)

    def test_only_one_parameter_needs_them(self):
        for name in ('channel_mixing.fc1.weight', f'{BOXES["row"]}.weight', f'{BOXES["lsmm"]}.tall.weight'):
            module, x = box('block')
            module.requires_grad_(False).get_parameter(name).requires_grad_()
            expected = hessian_product(float64_copy(module), x.double(), 'autograd.grad')
            assert_close(hessian_product(module, x, 'autograd.grad'), expected)

    @pytest.mark.parametrize('name', SHAPES)
    def test_by_finite_differences(self, name):
        """Of the reference itself, in float64: along one direction of parameters and input."""
        module, x = box(name, NORMS[1])
        leaves = [x.double().requires_grad_(), *module.double().parameters()]
        direction = [
            torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i)).double()
            for i, leaf in enumerate(leaves)
        ]

        def loss_and_slope(step=0.0):
            with torch.no_grad():
                for leaf, part in zip(leaves, direction):
                    leaf.add_(step * part)
            loss = loss_of(module(leaves[0])).square()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            slope = sum((gradient * part).sum() for gradient, part in zip(gradients, direction))
            bend = sum(
                (g * part).sum()
                for g, part in zip(torch.autograd.grad(slope, leaves, materialize_grads=True), direction)
            )
            with torch.no_grad():
                for leaf, part in zip(leaves, direction):
                    leaf.sub_(step * part)
            return loss.detach(), slope.detach(), bend

        _, slope, bend = loss_and_slope()
        (loss_up, slope_up, _), (loss_down, slope_down, _) = (loss_and_slope(step) for step in (1e-6, -1e-6))
        torch.testing.assert_close((loss_up - loss_down) / 2e-6, slope, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close((slope_up - slope_down) / 2e-6, bend, rtol=1e-5, atol=1e-3)


class TestGradients:
    @pytest.mark.parametrize('frozen', ['weight', 'bias', 'norm', 'depthwise', 'fc', 'position', 'strip_mixing'])
    def test_with_parts_frozen(self, frozen):
        model = backbone('train')
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        expected = assert_matches_float64(model, images())
        assert all((parameter.grad is None) == (frozen in name) for name, parameter in model.named_parameters())
        assert len(expected) > 10

    def test_nothing_needs_them(self):
        model = backbone('train').requires_grad_(False)
        assert not any(feature.requires_grad for feature in model(images()))

    @pytest.mark.parametrize('mode', MODES)
    def test_of_images_alone(self, mode):
        model = backbone(mode).requires_grad_(False)
        assert_matches_float64(model, images(), gradients=True)

    @pytest.mark.parametrize('mode', MODES)
    def test_in_every_mode(self, mode):
        assert_matches_float64(backbone(mode), images(), gradients=True)

    @pytest.mark.parametrize('size', [(24, 32), (57, 41)])
    @pytest.mark.parametrize('mode', MODES)
    def test_in_windows(self, mode, size):
        model = backbone(mode, img_size=64 if min(size) < 32 else 32)
        assert_matches_float64(model, images(2, 3, 32 + size[0] % 32, size[1]), gradients=True)

    @pytest.mark.parametrize('arguments', [dict(arch=dict(embed_dims=24, depths=(1, 1, 1, 1))), dict(num_patches=1)])
    def test_of_other_widths(self, arguments):
        for mode in MODES:
            assert_matches_float64(backbone(mode, **arguments), images(), gradients=True)

    def test_twice_through_one_graph(self):
        """What is saved for backward stays as it is."""
        model = backbone('train')
        loss = loss_of(model(images()))
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        second = torch.autograd.grad(loss, list(model.parameters()))
        assert all(map(torch.equal, first, second))

    def test_of_two_forwards_add_up(self):
        def gradients(model, *batches):
            sum(loss_of(model(x)) for x in batches).backward()
            return of_all({name: p.grad for name, p in model.named_parameters()})

        batches = images(), images(seed=1)
        expected = gradients(float64_copy(backbone('train')), *(x.double() for x in batches))
        assert_close(gradients(backbone('train'), *batches), expected)

    @pytest.mark.parametrize('mode', MODES)
    def test_a_weight_changed_before_backward_is_an_error(self, mode):
        """As of PyTorch's own layers."""
        for name in ('strip_mixing.depthwise.2', 'strip_mixing.fuse', 'channel_mixing.fc2', BOXES['row']):
            model = backbone(mode)
            loss = loss_of(model(images()))
            with torch.no_grad():
                module_of_block(model, name).weight.mul_(2)
            with pytest.raises(RuntimeError, match='modified by an inplace operation'):
                loss.backward()

    def test_of_chosen_inputs(self):
        model = backbone('train')
        chosen = (
            module_of_block(model, 'channel_mixing.fc1').weight,
            module_of_block(model, BOXES['position_row']).table,
        )
        loss_of(model(images())).backward(inputs=chosen)
        grads = {f'grad of {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(grads) == 2
        assert_close(grads, {name: unchanged_outputs('train')[name] for name in grads})

    def test_steps_within_backward(self):
        """Each parameter is changed as soon as its gradient is there."""

        def step(parameter):
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=1e-3)

        model, reference = backbone('train'), float64_copy(backbone('train'))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        outputs_of(model, images())
        outputs_of(reference, images().double())
        for one, other in zip(model.parameters(), reference.parameters()):
            step(other)
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('mode', MODES)
    def test_with_hooks_on_what_is_saved(self, mode):
        """Saved tensors that are packed and unpacked, as those that go to disk."""
        model = backbone(mode)
        packed = []

        def pack(tensor):
            packed.append(tensor.shape)
            return tensor.detach().clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert_close(
                outputs_of(model, images(), gradients=True), float64_outputs(backbone(mode), images(), gradients=True)
            )
        assert packed

    def test_with_hooks_on_parameters(self):
        model, seen = backbone('train'), {}

        def double(parameter):
            parameter.grad.mul_(2)

        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: seen.update({f'grad of {name}': gradient.clone()}))
            parameter.register_post_accumulate_grad_hook(double)
        x = images()
        loss_of(model(x)).backward()
        expected = {name: value for name, value in unchanged_outputs('train').items() if name in seen}
        assert len(seen) == len(list(model.parameters()))
        assert_close(seen, expected)
        doubled = {f'grad of {name}': p.grad / 2 for name, p in model.named_parameters()}
        assert_close(doubled, expected)

    @pytest.mark.parametrize('use_reentrant', [True, False])
    @pytest.mark.parametrize('norms', NORMS)
    @pytest.mark.parametrize('name', ['cgsmm', 'lsmm', 'strip_mixing', 'channel_mixing', 'block'])
    def test_checkpoints_of_a_box(self, name, norms, use_reentrant):
        module, x = box(name, norms)
        got = outputs_of(
            lambda_module(module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)), x, gradients=True
        )
        assert_close(got, outputs_of(float64_copy(box(name, norms)[0]), x.double(), gradients=True))

    def test_vectorized_jacobian(self):
        module, x = box('block', NORMS[1])

        def function(x):
            return module(x).flatten()[::97]

        got = jacobian(function, x, vectorize=True)
        module.double()
        assert_close({'map': got}, {'map': jacobian(function, x.double())})

    def test_under_anomaly_detection(self):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with torch.autograd.detect_anomaly():
                assert_matches_float64(backbone('train'), images())

    def test_sparse_and_expanded_gradients(self):
        """Gradients that are not dense in memory: of a mean, of a sum, of one pixel."""
        for reduce in (
            torch.mean,
            torch.sum,
            lambda out: out[0, 0, 0, 0],
            lambda out: out.transpose(2, 3)[..., ::2].sum(),
        ):
            for name in ('row', 'lsmm', 'block'):
                results = []
                for kind in (torch.float32, torch.float64):
                    module, x = box(name)
                    module, x = module.to(kind), x.to(kind).requires_grad_()
                    reduce(module(x)).backward()
                    results.append(of_all({'x': x.grad, **{key: p.grad for key, p in module.named_parameters()}}))
                assert_close(*results, tolerance=1e-3)


def lambda_module(module, forward):
    """A module whose forward is another function; outputs_of() asks it for parameters and mode."""
    forward.training = module.training
    forward.zero_grad = module.zero_grad
    forward.named_parameters = module.named_parameters
    return forward


class TestGraphs:
    @pytest.mark.filterwarnings('ignore')
    def test_trace(self):
        """With the check, which runs the model again; then on another image."""
        traced = torch.jit.trace(backbone('eval'), images())
        with torch.no_grad():
            got = {f'map {i}': feature for i, feature in enumerate(traced(images(seed=1)))}
        assert_close(got, float64_outputs(backbone('eval'), images(seed=1)))

    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize('mode', MODES)
    def test_trace_of_a_stage(self, mode):
        traced = torch.jit.trace(SecondStage(mode), SecondStage.input(), check_trace=mode != 'train')
        x = SecondStage.input(seed=1)
        assert_close(outputs_of(traced, x, gradients=False), float64_outputs(SecondStage(mode), x, gradients=False))

    @pytest.mark.parametrize('name', SHAPES)
    def test_trace_of_a_box(self, name):
        module, x = box(name, NORMS[1])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', torch.jit.TracerWarning)
            traced = torch.jit.trace(module, x)
        assert_close(outputs_of(traced, x, gradients=False), float64_outputs(module, x, gradients=False))

    @pytest.mark.parametrize('mode, strict', [('eval', True), ('deploy', False)])
    def test_export(self, mode, strict):
        """Of a stage, for any number of images."""
        batch = {0: torch.export.Dim('batch', min=2, max=64)}
        stage, x = SecondStage(mode), images(5, 32, 4, 4)
        exported = torch.export.export(stage, (SecondStage.input(),), dynamic_shapes=(batch,), strict=strict).module()
        with torch.no_grad():
            assert_close({'map 0': exported(x)}, float64_outputs(stage, x))

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_export_of_the_model(self, mode):
        exported = torch.export.export(backbone(mode), (images(),), strict=False).module()
        with torch.no_grad():
            maps = exported(images(seed=1))
        got = {f'map {i}': feature for i, feature in enumerate(maps)}
        assert_close(got, float64_outputs(backbone(mode), images(seed=1)))

    @pytest.mark.parametrize('mode', MODES)
    def test_compile_without_graph_breaks(self, mode):
        torch._dynamo.reset()
        stage = SecondStage(mode)
        expected = float64_outputs(stage, SecondStage.input())
        got = outputs_of(torch.compile(stage, fullgraph=True, backend='eager'), SecondStage.input())
        assert_close({name.replace('_orig_mod.', ''): value for name, value in got.items()}, expected)

    @pytest.mark.parametrize('mode', MODES)
    def test_make_fx(self, mode):
        stage, x = SecondStage(mode), SecondStage.input(seed=1)
        with torch.no_grad():
            graph = torch.fx.experimental.proxy_tensor.make_fx(copy.deepcopy(stage))(SecondStage.input())
            assert not any('mmstrip' in str(node.target) for node in graph.graph.nodes)
            assert_close({'map 0': graph(x)}, float64_outputs(stage, x, gradients=False))

    @pytest.mark.parametrize('mode', MODES)
    def test_fake_tensors(self, mode):
        model, x = backbone(mode), images(2, 3, 32, 48)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
            maps = model(fake.from_tensor(x))
        assert [tuple(feature.shape) for feature in maps] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]


LAYOUTS = {
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'expanded': lambda x: x.mean(dim=(1, 2), keepdim=True).expand(x.shape),
}


class TestDevicesAndDtypes:
    @pytest.mark.parametrize('gradients', [True, False])
    @pytest.mark.parametrize('mode', MODES)
    def test_meta(self, mode, gradients):
        model = backbone(mode).to('meta')
        with torch.set_grad_enabled(gradients):
            maps = model(torch.empty(2, 3, 40, 48, device='meta'))
            assert [tuple(feature.shape) for feature in maps] == [(2, 16, 10, 12), (2, 32, 5, 6), (2, 64, 2, 3)]
            if gradients:
                loss_of_meta = sum(feature.sum() for feature in maps)
                loss_of_meta.backward()

    @pytest.mark.parametrize('mode', MODES)
    def test_from_meta_to_empty(self, mode):
        """Built without memory, then filled."""
        with torch.device('meta'):
            model = backbone(mode)
        model = model.to_empty(device='cpu')
        model.load_state_dict(backbone(mode).state_dict())
        assert_close(outputs_of(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_from_meta_by_assignment(self, mode):
        with torch.device('meta'):
            model = backbone(mode)
        model.load_state_dict(backbone(mode).state_dict(), assign=True)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        assert_close(outputs_of(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize('mode', MODES)
    def test_half_precision(self, mode, dtype):
        model = backbone(mode).to(dtype)
        maps = model(images().to(dtype))
        for i, feature in enumerate(maps):
            expected = unchanged_outputs(mode)[f'map {i}']
            assert feature.dtype == dtype
            assert (feature.double() - expected).abs().mean() < 0.03 * expected.abs().mean()
        loss_of(maps).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize('mode', MODES)
    def test_autocast(self, mode):
        """Linear layers and convolutions run in bfloat16, and gradients are float32."""
        model, seen = backbone(mode), {}
        for name in ('channel_mixing.fc1', 'strip_mixing.fuse', 'strip_mixing.depthwise.2'):
            module_of_block(model, name).register_forward_hook(
                lambda *hooked, name=name: seen.update({name: hooked[2].dtype})
            )
        with torch.autocast('cpu', torch.bfloat16):
            maps = model(images())
        assert set(seen.values()) == {torch.bfloat16} and len(seen) == 3
        for i, feature in enumerate(maps):
            expected = unchanged_outputs(mode)[f'map {i}']
            assert (feature.double() - expected).abs().mean() < 0.03 * expected.abs().mean()
        loss_of(maps).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize('mode', MODES)
    def test_half_precision_with_norms_in_float32(self, mode):
        model = backbone(mode).bfloat16()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.float()
        maps = model(images().bfloat16())
        for i, feature in enumerate(maps):
            expected = unchanged_outputs(mode)[f'map {i}']
            assert (feature.double() - expected).abs().mean() < 0.03 * expected.abs().mean()
        loss_of(maps).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize('mode', MODES)
    def test_nan_spreads_as_in_the_reference(self, mode):
        x = images()
        x[0, 1, 13, 20] = torch.nan
        got = outputs_of(backbone(mode).eval(), x)
        expected = outputs_of(ops.restore(backbone(mode).eval()), x)
        for name, value in expected.items():
            assert value[0].isnan().any() and not value[1].isnan().any()
            assert torch.equal(got[name].isnan(), value.isnan())
            assert_close({'map': got[name][1]}, {'map': value[1]})

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_no_images(self, mode):
        with torch.no_grad():
            maps = backbone(mode)(images(0, 3, 32, 40))
        assert [tuple(feature.shape) for feature in maps] == [(0, 16, 8, 10), (0, 32, 4, 5), (0, 64, 2, 2)]

    def test_one_pixel_is_no_batch(self):
        """BN refuses it in training, as everywhere."""
        model = backbone('train', out_indices=(3,))
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            model(images(1, 3, 32, 32))

    @pytest.mark.parametrize('mode', ['train', 'eval'])
    def test_training_in_autocast(self, mode):
        """Gradients in the direction of the expected ones."""
        model = backbone(mode)
        with torch.autocast('cpu', torch.bfloat16):
            maps = model(images())
        loss_of(maps).backward()
        expected = float64_outputs(model, images(), gradients=True)
        for name, parameter in model.named_parameters():
            if not name.endswith('project.0.bias'):  # 0 but for rounding
                one, other = parameter.grad.double().flatten(), expected[f'grad of {name}'].flatten()
                assert torch.cosine_similarity(one, other, dim=0) > 0.95, name

    @pytest.mark.parametrize('mode', MODES)
    def test_other_defaults(self, mode, monkeypatch):
        """New tensors are float64, and what is not written is NaN."""
        expected, x, model = float64_outputs(backbone(mode), images()), images(), backbone(mode)
        monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
        try:
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
            got = outputs_of(model, x)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
        assert all(value.dtype == torch.float32 for value in got.values())
        assert_close(got, expected)

    @pytest.mark.parametrize('mode', MODES)
    def test_back_from_other_dtypes(self, mode):
        model = backbone(mode)
        outputs_of(model, images(), gradients=False)
        model.double()
        outputs_of(model, images().double(), gradients=False)
        model.float().load_state_dict(backbone(mode).state_dict())
        assert_close(outputs_of(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize(
        'layout',
        [
            'channels_last model',
            'channels_last',
            'expanded',
            'strided',
            'offset',
            'unaligned',
            'a view of its negative',
        ],
    )
    @pytest.mark.parametrize('mode', MODES)
    def test_memory_layouts(self, mode, layout):
        model, x = backbone(mode), images()
        if layout == 'channels_last model':
            model = model.to(memory_format=torch.channels_last)
        elif layout == 'channels_last':
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == 'expanded':
            x = images(1, 3, 32, 32).expand(2, -1, -1, -1)
        elif layout == 'strided':
            x = images(4, 3, 64, 64)[::2, :, ::2, ::2]
        elif layout == 'offset':
            x = images(5, 3, 32, 32)[1:3]
        elif layout == 'unaligned':
            x = torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
        elif layout == 'a view of its negative':
            x = torch._neg_view(-x)
        with torch.no_grad():
            got = {f'map {i}': feature for i, feature in enumerate(model(x))}
        assert all(feature.is_contiguous() for feature in got.values())
        assert_close(got, float64_outputs(backbone(mode), x, gradients=False))

    @pytest.mark.parametrize('layout', LAYOUTS)
    @pytest.mark.parametrize('name', SHAPES)
    def test_memory_layouts_of_a_box(self, name, layout):
        module, x = box(name)
        x = LAYOUTS[layout](x)
        expected = outputs_of(float64_copy(module), x.double())
        assert_close(outputs_of(module, x, gradients=False), {'map 0': expected['map 0']})
        assert_close(outputs_of(box(name)[0], x), expected, tolerance=1e-3)

    @pytest.mark.parametrize('mode', MODES)
    def test_inputs_stay_as_they_are(self, mode):
        model, x = backbone(mode), images()
        outputs_of(model, x, gradients=False)
        assert torch.equal(x, images())
        for name in SHAPES:
            module, x = box(name, NORMS[0] if mode == 'train' else NORMS[1])
            with torch.no_grad():
                module(x)
            assert torch.equal(x, images(*SHAPES[name])), name


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        self.seen.append(getattr(function, '__name__', str(function)))
        return function(*arguments, **(named or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen.append(str(function))
        return function(*arguments, **(named or {}))


class Traced(torch.Tensor):
    """A tensor that other libraries derive from Tensor."""


class TestModesAndCounts:
    @pytest.mark.parametrize('mode', MODES)
    def test_function_mode_sees_the_layers(self, mode):
        with Functions() as functions:
            got = outputs_of(backbone(mode), images())
        assert functions.seen.count('gelu') >= 4 * 5
        assert functions.seen.count('linear') >= 2 * 4
        assert_close(got, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_dispatch_mode_sees_aten_only(self, mode):
        model = backbone(mode)
        with Dispatched() as dispatched:
            got = outputs_of(model, images())
        assert dispatched.seen and not any('mmstrip' in name for name in dispatched.seen)
        assert_close(got, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_tensors_of_another_class(self, mode):
        x = images().as_subclass(Traced)
        model = backbone(mode)
        with torch.no_grad():
            maps = model(x)
        assert all(type(feature) is Traced for feature in maps)
        got = {f'map {i}': feature.as_subclass(torch.Tensor) for i, feature in enumerate(maps)}
        assert_close(got, {name: value for name, value in unchanged_outputs(mode).items() if name.startswith('map')})

    @pytest.mark.parametrize('mode', MODES)
    def test_flops_of_each_layer(self, mode):
        """torch.utils.flop_counter counts two for a multiply-add."""
        model = backbone(mode)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(images())
        counts = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
        pixels, prefix = 2 * 4 * 4, f'StripMLP.{BLOCK}.'
        for name, per_pixel in {
            'channel_mixing.fc1': 32 * 96,
            'channel_mixing.fc2': 96 * 32,
            'channel_mixing.depthwise': 32 * 49,
            'strip_mixing.depthwise.2': 32 * 9,
            'strip_mixing.project.0': 32 * 32,
            f'{BOXES["lsmm"]}.tall': 16 * 21,
            BOXES['row']: 16 * 4 * 3,
        }.items():
            assert counts[prefix + name] == 2 * pixels * per_pixel, name

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_flops_by_mmengine(self, mode):
        counts = FlopAnalyzer(backbone(mode), images(1, 3, 32, 32)).by_module()
        pixels = 4 * 4
        assert counts[f'{BLOCK}.channel_mixing.fc1'] == pixels * 32 * 96
        assert counts[f'{BLOCK}.channel_mixing.depthwise'] == pixels * 32 * 49
        assert counts[f'{BLOCK}.strip_mixing.project.0'] == pixels * 32 * 32
        whole = get_model_complexity_info(backbone(mode), (3, 32, 32), show_table=False, show_arch=False)
        assert whole['flops'] == counts[''] > 0

    def test_profiled_memory_and_shapes(self):
        with torch.profiler.profile(record_shapes=True, profile_memory=True):
            assert_matches_float64(backbone('train'), images())


class TestQuantization:
    @pytest.mark.skipif(not hasattr(torch.ao.quantization, 'quantize_dynamic'), reason='this PyTorch has none')
    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_dynamic(self, mode):
        """Linear layers on int8: close, and not the same."""
        model = torch.ao.quantization.quantize_dynamic(backbone(mode), {nn.Linear}, dtype=torch.qint8)
        assert type(module_of_block(model, 'channel_mixing.fc1')).__module__.startswith('torch.ao.nn.quantized.dynamic')
        got, expected = outputs_of(model, images()), unchanged_outputs(mode)
        for name, value in expected.items():
            error = (got[name] - value).abs().max() / value.abs().max()
            assert 1e-5 < error < 0.03, name

    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize('mode', ['train', 'eval'])
    def test_fake_quantised_weights(self, mode):
        """As in quantization-aware training: a linear layer that rounds its weight."""

        class Rounded(nn.Linear):
            def forward(self, x):
                return nn.functional.linear(
                    x, torch.fake_quantize_per_tensor_affine(self.weight, 0.02, 0, -128, 127), self.bias
                )

        model = backbone(mode)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Rounded
        reference = float64_copy(backbone(mode))
        for module in reference.modules():
            if type(module) is nn.Linear:
                module.weight.data.div_(0.02).round_().clamp_(-128, 127).mul_(0.02)
        expected = outputs_of(reference, images().double(), gradients=False)
        assert_close(outputs_of(model, images(), gradients=False), expected)
        assert_changed(expected, unchanged_outputs(mode))
