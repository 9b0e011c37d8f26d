"""The model follows its state: however a tensor is changed, the next forward uses what is there now."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.behaviours import (
    BLOCK,
    CGSMM,
    MODES,
    assert_changed,
    assert_close,
    assert_matches_float64,
    backbone,
    float64_copy,
    float64_outputs,
    images,
    loss_of,
    maps_of,
    numbered,
    outputs_of,
    unchanged_outputs,
)
from mmengine.model import ExponentialMovingAverage, StochasticWeightAverage
from torch import nn
from torch.optim import swa_utils

CONTEXTS = {'grad': torch.enable_grad, 'no_grad': torch.no_grad, 'inference_mode': torch.inference_mode}


def forward(model, x=None):
    """Maps by number, in the present gradient mode."""
    return numbered(model(images() if x is None else x))


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize('mode', ['eval', 'deploy'])
def test_copies_do_not_follow_each_other(mode, copied):
    model = backbone(mode)
    size = len(pickle.dumps(model))
    outputs_of(model, images())
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert_close(outputs_of(model, images()), unchanged_outputs(mode))
    assert_changed(assert_matches_float64(other, images()), unchanged_outputs(mode))
    assert len(pickle.dumps(model)) <= size + 100  # packed weights are no part of a model


@pytest.mark.parametrize('mode', MODES)
def test_a_model_is_freed(mode):
    model = backbone(mode)
    outputs_of(model, images())
    references = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in references)


AVERAGES = {
    'EMA': lambda model: ExponentialMovingAverage(model, momentum=0.4, update_buffers=True),
    'EMA of parameters': lambda model: ExponentialMovingAverage(model, momentum=0.4),
    'SWA': StochasticWeightAverage,
    "PyTorch's EMA": lambda model: swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn()),
    "PyTorch's SWA": lambda model: swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
}


@pytest.mark.parametrize('average', AVERAGES)
@pytest.mark.parametrize('context', CONTEXTS)
def test_averages_follow_the_student(average, context):
    """Others write their weights, and they stay in evaluation mode."""
    student = backbone('train')
    teacher = AVERAGES[average](student).eval()
    before = unchanged_outputs('eval')
    for seed in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        student(images(seed=seed))
        teacher.update_parameters(student)
        with CONTEXTS[context]():
            got = forward(teacher)
        assert_close(got, float64_outputs(teacher.module, images()))
        assert_changed(got, before)
        before = got


def test_averages_are_swapped_in_and_out():
    """As EMAHook does around a validation, by .data.copy_, which moves no version of a tensor."""
    model = backbone('deploy')
    average = ExponentialMovingAverage(model, momentum=0.5)
    for parameter in average.module.parameters():
        parameter.data.mul_(1.1)
    before = outputs_of(model, images())
    for expected in (float64_outputs(average.module, images()), before):
        for mine, other in zip(model.parameters(), average.module.parameters()):
            kept = mine.data.clone()
            mine.data.copy_(other.data)
            other.data.copy_(kept)
        assert_close(outputs_of(model, images()), expected)
    assert_changed(outputs_of(average.module, images()), before)


@pytest.mark.parametrize('assign', [False, True], ids=['copied', 'assigned'])
@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('mode', MODES)
def test_loaded_weights_are_used(mode, context, assign):
    """Also where a model was built within inference mode."""
    other, usual = backbone(mode, seed=1).state_dict(), backbone(mode)
    with CONTEXTS[context]():
        for model in (usual, backbone(mode)):
            forward(model)
            model.load_state_dict(copy.deepcopy(other), assign=assign)
            assert_close(forward(model), maps_of(unchanged_outputs(mode, seed=1)))


def test_trained_weights_are_deployed():
    """Loaded after a forward, and folded within inference mode."""
    for context in CONTEXTS.values():
        model = backbone('eval')
        outputs_of(model, images())
        with context():
            model.load_state_dict(backbone(seed=1).state_dict())
            model.switch_to_deploy()
            assert_close(forward(model), unchanged_outputs('eval', seed=1))
        assert_close(outputs_of(model, images()), unchanged_outputs('eval', seed=1))


def doubled(value):
    new = value.detach() * 2
    return nn.Parameter(new) if isinstance(value, nn.Parameter) else new


def set_data(value):
    value.data = value.data * 2


def write_by_numpy(value):
    value.detach().numpy()[...] *= 2


def in_inference_mode(value):
    with torch.inference_mode():
        value.mul_(2)


# Ways to double a tensor, with its module and name where it takes them.
WAYS = {
    'in place': lambda value, *_: value.mul_(2),
    'in inference mode': lambda value, *_: in_inference_mode(value),
    'through data': lambda value, *_: value.data.mul_(2),
    'by other data': lambda value, *_: set_data(value),
    'by numpy': lambda value, *_: write_by_numpy(value),
    'by a detached view': lambda value, *_: value.detach().view(-1).mul_(2),
    'by set_': lambda value, *_: value.set_(value * 2),
    'assigned': lambda value, module, name: setattr(module, name, doubled(value)),
    'loaded': lambda value, module, name: module.load_state_dict({name: 2 * value}, strict=False),
    'swapped': lambda value, *_: torch.utils.swap_tensors(value, doubled(value)),
}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('mode', ['eval', 'deploy'])
def test_each_changed_tensor_is_followed(mode, way):
    """All of a block, one after the other."""
    model = backbone(mode)
    before = outputs_of(model, images())
    for key, value in model.state_dict(keep_vars=True).items():
        if not key.startswith(BLOCK) or not value.is_floating_point():
            continue
        name, _, tensor = key.rpartition('.')
        try:
            with torch.no_grad():
                WAYS[way](value, model.get_submodule(name), tensor)
        except RuntimeError:  # PyTorch swaps no tensors that somebody else holds, as packed weights do
            assert (mode, way) == ('deploy', 'swapped')
            return
        after = outputs_of(model, images())
        assert max((after[place] - before[place]).abs().max() for place in after) > 1e-6, key  # scales before norms
        before = after
    assert_matches_float64(model, images())


def test_evaluation_between_steps_of_training():
    """In a bare loop: each sees the weights and statistics of the last step, as in float64."""
    models = backbone('train'), float64_copy(backbone('train'))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in models]
    for seed in range(3):
        for model, optimizer in zip(models, optimizers):
            x = images(seed=seed).to(model.patch_embed.weight.dtype)
            optimizer.zero_grad()
            (loss_of(model.train()(x)) / 100).backward()
            optimizer.step()
        got = assert_matches_float64(models[0].eval(), images())
        assert_close(got, outputs_of(models[1].eval(), images().double()), tolerance=1e-3)


def test_the_deploy_form_trains():
    """Nobody should, but it is expected."""
    assert_matches_float64(backbone('deploy').train(), images())


@pytest.mark.parametrize('mode', MODES)
def test_inference_mode_leaves_no_trace(mode):
    """Its maps and statistics are right, gradients after it too, and its images may be used outside of it."""
    model, reference = backbone(mode), float64_copy(backbone(mode))
    with torch.inference_mode():
        x = images()
        assert_close(forward(model, x), forward(reference, x.double()))
    with torch.no_grad():
        assert_close(forward(model, x), forward(reference, images().double()))
    got, expected = (outputs_of(one, images().to(one.patch_embed.weight.dtype), True) for one in (model, reference))
    assert_close(got, expected)


@pytest.mark.parametrize('mode', ['eval', 'deploy'])
def test_forwards_in_many_threads(mode):
    """From the first one on."""
    model = backbone(mode)

    def work(seed):
        with torch.no_grad():
            return forward(model, images(seed=seed % 3))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(24)))
    expected = [float64_outputs(model, images(seed=seed)) for seed in range(3)]
    for seed, result in enumerate(results):
        assert_close(result, expected[seed % 3])


SHARED = (
    *('strip_mixing', 'strip_mixing.project.0', CGSMM, f'{CGSMM}.row', f'{CGSMM}.position_row'),
    *(f'{CGSMM}.fuse_row.weight', 'strip_mixing.fuse', 'channel_mixing', 'channel_mixing.norm', 'channel_mixing.fc1'),
    *('channel_mixing.fc1.weight', 'channel_mixing.grn', 'channel_mixing.fc2', 'channel_mixing.fc2.bias'),
)


@pytest.mark.parametrize('shared', SHARED)
def test_shared_layers_are_not_folded_twice(shared):
    model = backbone('eval')
    name, _, last = shared.rpartition('.')
    first, second = (block.get_submodule(name) for block in model.stages[2])
    setattr(second, last, getattr(first, last))
    expected = float64_outputs(model, images())
    try:
        model.switch_to_deploy()
    except ValueError as error:
        assert 'stages.2.' in str(error)
        return
    assert_close(outputs_of(model, images()), expected)
