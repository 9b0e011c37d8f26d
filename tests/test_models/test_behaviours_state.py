"""The model follows its state: however a tensor is changed, the next forward uses what is there now."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from helpers.behaviours import (
    BLOCK,
    BOXES,
    MODES,
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
    replace_in_block,
    unchanged_outputs,
)
from mmengine.model import ExponentialMovingAverage, StochasticWeightAverage
from torch import nn
from torch.optim import swa_utils

pytest_plugins = ['helpers.behaviours']

CONTEXTS = {'grad': torch.enable_grad, 'no_grad': torch.no_grad, 'inference_mode': torch.inference_mode}


def forward(model, x=None):
    """Maps by number, in the present gradient mode."""
    return {f'map {i}': feature.detach() for i, feature in enumerate(model(images() if x is None else x))}


def outputs_with_values_of(model):
    """What its float64 copy gives, made from the values that the model has now."""
    reference = float64_copy(backbone('deploy' if model.deploy else 'eval'))
    with torch.no_grad():
        for (name, tensor), (other, value) in zip(tensors_of(reference), tensors_of(model)):
            assert name == other
            tensor.copy_(value)
    return outputs_of(reference.train(model.training), images().double(), gradients=False)


def tensors_of(model):
    """Parameters and buffers of the state dict, by name."""
    kept = model.state_dict(keep_vars=True)
    return [(name, kept[name]) for name in sorted(kept)]


def maps_of(results):
    return {name: value for name, value in results.items() if name.startswith('map')}


class TestCopies:
    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize('mode', MODES)
    def test_deepcopy_and_pickle(self, mode, copied):
        """Before and after forwards; neither follows the other."""
        model = backbone(mode)
        early = copied(model)
        outputs_of(model, images(), gradients=False)
        model.load_state_dict(backbone(mode).state_dict())  # training has moved the statistics
        late = copied(model)
        for one in (early, late):
            assert_close(outputs_of(one, images()), unchanged_outputs(mode))
        with torch.no_grad():
            for parameter in late.parameters():
                parameter.mul_(1.5)
            late.load_state_dict({k: v for k, v in model.state_dict().items() if 'running' in k}, strict=False)
        assert_close(outputs_of(model.eval(), images()), float64_outputs(backbone(mode).eval(), images()))
        got = outputs_of(late.eval(), images())
        assert_close(got, outputs_with_values_of(late))
        assert_changed(got, outputs_of(model, images()))

    @pytest.mark.parametrize('mode', MODES)
    def test_saved_whole(self, mode):
        model, file = backbone(mode), io.BytesIO()
        outputs_of(model, images())
        model.load_state_dict(backbone(mode).state_dict())
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loaded.training == model.training and loaded.deploy == model.deploy
        assert_close(outputs_of(loaded, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_size_of_a_pickle_does_not_grow(self, mode):
        """Packed weights are no part of a model."""
        model = backbone(mode)
        before = len(pickle.dumps(model))
        outputs_of(model, images())
        assert len(pickle.dumps(model)) <= before + 100

    def test_a_copy_trains(self):
        model = backbone('train')
        outputs_of(model, images())
        model.load_state_dict(backbone('train').state_dict())
        assert_close(outputs_of(copy.deepcopy(model), images()), unchanged_outputs('train'))

    def test_deploy_of_a_copy_leaves_the_model_alone(self):
        model = backbone('eval')
        outputs_of(model, images())
        deployed = copy.deepcopy(model)
        deployed.switch_to_deploy()
        assert_close(outputs_of(deployed, images()), unchanged_outputs('eval'))
        assert_close(outputs_of(model, images()), unchanged_outputs('eval'))
        assert_close(outputs_of(model.train(), images()), unchanged_outputs('train'))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_model_is_freed(self, mode):
        model = backbone(mode)
        outputs_of(model, images())
        references = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
        del model
        gc.collect()
        assert not any(reference() is not None for reference in references)

    def test_a_copied_stage_runs_by_itself(self):
        model = backbone('deploy')
        outputs_of(model, images())
        stage, x = copy.deepcopy(model.stages[1]), images(2, 32, 4, 4)
        with torch.no_grad():
            expected = stage.double()(x.double())
            assert_close({'map': stage.float()(x)}, {'map': expected})
            assert_close({'map': model.stages[1](x)}, {'map': expected})


class TestAverages:
    """Models whose weights others write, to .data among them, and that stay in evaluation mode."""

    @pytest.mark.parametrize('average', [ExponentialMovingAverage, StochasticWeightAverage])
    @pytest.mark.parametrize('context, update_buffers', [('grad', True), ('no_grad', False), ('inference_mode', False)])
    def test_of_mmengine(self, average, update_buffers, context):
        student = backbone('train')
        arguments = dict(momentum=0.4) if average is ExponentialMovingAverage else {}
        teacher = average(student, update_buffers=update_buffers, **arguments).eval()
        for seed in range(3):
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            student(images(seed=seed))
            teacher.update_parameters(student)
            with CONTEXTS[context]():
                got = forward(teacher)
            assert_close(got, outputs_with_values_of(teacher.module))

    @pytest.mark.parametrize('average', [swa_utils.get_ema_multi_avg_fn, swa_utils.get_swa_multi_avg_fn])
    def test_of_pytorch(self, average):
        student = backbone('train')
        teacher = swa_utils.AveragedModel(student, multi_avg_fn=average()).eval()
        for seed in range(3):
            loss_of(student(images(seed=seed))).backward()
            torch.optim.SGD(student.parameters(), lr=1e-3).step()
            student.zero_grad()
            teacher.update_parameters(student)
            with torch.no_grad():
                assert_close(forward(teacher), outputs_with_values_of(teacher.module))

    def test_a_teacher_written_through_data(self):
        student, teacher = backbone('train', seed=1), backbone('eval').requires_grad_(False)
        outputs_of(teacher, images())
        for _ in range(2):
            for mine, others in zip(teacher.parameters(), student.parameters()):
                mine.data.mul_(0.5).add_(others.data, alpha=0.5)
            assert_changed(outputs_of(teacher, images()), unchanged_outputs('eval'))
            assert_close(outputs_of(teacher, images()), outputs_with_values_of(teacher))


class TestLoading:
    @pytest.mark.parametrize('assign', [False, True], ids=['copied', 'assigned'])
    @pytest.mark.parametrize('context', CONTEXTS)
    @pytest.mark.parametrize('mode', MODES)
    def test_after_a_forward(self, mode, context, assign):
        model = backbone(mode)
        other = backbone(mode, seed=1).state_dict()
        with CONTEXTS[context]():
            first = forward(model)
            model.load_state_dict(copy.deepcopy(other), assign=assign)
            second = forward(model)
        assert_changed(second, first)
        assert_close(second, float64_outputs(backbone(mode, seed=1), images(), gradients=False))

    @pytest.mark.parametrize('context', ['no_grad', 'inference_mode'])
    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_each_key_alone(self, mode, context):
        """Of a block, one after the other."""
        model, other = backbone(mode), backbone(mode, seed=1).state_dict()
        keys = [key for key in other if key.startswith(BLOCK) and not key.endswith('num_batches_tracked')]
        with CONTEXTS[context]():
            before = forward(model)
            for key in keys:
                model.load_state_dict({key: other[key]}, strict=False)
                after = forward(model)
                assert max((after[name] - before[name]).abs().max() for name in after) > 1e-4, key
                before = after
        assert_close(before, outputs_with_values_of(model))

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_a_model_built_in_inference_mode(self, mode):
        with torch.inference_mode():
            model = backbone(mode)
            assert_close(forward(model), unchanged_outputs(mode))
            model.load_state_dict(backbone(mode, seed=1).state_dict())
            assert_close(forward(model), float64_outputs(backbone(mode, seed=1), images()))
            module_of_block(model, 'channel_mixing.fc2').weight.mul_(2)
            assert_close(forward(model), outputs_with_values_of(model))

    def test_trained_weights_then_deploy(self):
        model = backbone('eval')
        outputs_of(model, images())
        model.load_state_dict(backbone(seed=1).state_dict())
        model.switch_to_deploy()
        assert_close(outputs_of(model, images()), float64_outputs(backbone(seed=1), images()))

    def test_deploy_in_inference_mode(self):
        model = backbone('eval')
        with torch.inference_mode():
            model.switch_to_deploy()
            assert_close(forward(model), unchanged_outputs('eval'))
        assert_close(outputs_of(model, images()), unchanged_outputs('eval'))


def ways_of_change():
    """Ways to change a tensor of a module, by name: each doubles it."""

    def in_place(module, name):
        with torch.no_grad():
            getattr(module, name).mul_(2)

    def in_inference_mode(module, name):
        with torch.inference_mode():
            getattr(module, name).mul_(2)

    def through_data(module, name):
        getattr(module, name).data.mul_(2)

    def by_other_data(module, name):
        getattr(module, name).data = getattr(module, name).data * 2

    def by_numpy(module, name):
        getattr(module, name).detach().numpy()[...] *= 2

    def by_a_detached_view(module, name):
        getattr(module, name).detach().view(-1).mul_(2)

    def assigned(module, name):
        value = getattr(module, name)
        new = value.detach() * 2
        setattr(module, name, nn.Parameter(new) if isinstance(value, nn.Parameter) else new)

    def set_(module, name):
        with torch.no_grad():
            getattr(module, name).set_(getattr(module, name) * 2)

    def swapped(module, name):
        value = getattr(module, name)
        new = value.detach() * 2
        torch.utils.swap_tensors(value, nn.Parameter(new) if isinstance(value, nn.Parameter) else new)

    return {function.__name__: function for function in list(locals().values())}


CHANGES = ways_of_change()
CHANGED = {
    'strip_mixing.depthwise.0': 'running_mean',
    'strip_mixing.depthwise.2': 'weight',
    'strip_mixing.project.0': 'bias',
    BOXES['row']: 'weight',
    BOXES['position_row']: 'table',
    f'{BOXES["lsmm"]}.tall': 'weight',
    'strip_mixing.fuse': 'weight',
    'channel_mixing.fc1': 'weight',
    'channel_mixing.grn': 'gamma',
}


SHARED = (
    'strip_mixing',
    'strip_mixing.project.0',
    'strip_mixing.branches.cgsmm',
    'strip_mixing.branches.cgsmm.row',
    'strip_mixing.branches.cgsmm.position_row',
    'strip_mixing.branches.cgsmm.fuse_row.weight',
    'strip_mixing.fuse',
    'channel_mixing',
    'channel_mixing.norm',
    'channel_mixing.fc1',
    'channel_mixing.fc1.weight',
    'channel_mixing.grn',
    'channel_mixing.fc2',
    'channel_mixing.fc2.bias',
)


class TestChangesBetweenForwards:
    @pytest.mark.parametrize('change', CHANGES)
    @pytest.mark.parametrize('mode', MODES)
    def test_of_one_tensor(self, mode, change):
        """One after the other, all noticed."""
        model = backbone(mode)
        before = outputs_of(model, images(), gradients=False)
        for name, attribute in CHANGED.items():
            if mode == 'deploy' and (attribute == 'table' or name.endswith('project.0')):
                continue
            if mode == 'train' and attribute in ('running_mean', 'bias'):
                continue  # without effect
            module = module_of_block(model, name)
            try:
                CHANGES[change](module, attribute)
            except RuntimeError:  # PyTorch swaps no tensors that somebody else holds, as packed weights do
                assert (mode, change) == ('deploy', 'swapped')
                return
            after = outputs_of(model, images(), gradients=False)
            assert max((after[key] - before[key]).abs().max() for key in after) > 1e-4, name
            before = after
        assert_close(outputs_of(model, images(), gradients=False), outputs_with_values_of(model))

    @pytest.mark.parametrize('context', ['grad', 'inference_mode'])
    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_of_every_tensor(self, mode, context):
        """In place, of all blocks of a stage."""
        model = backbone(mode)
        with CONTEXTS[context]():
            before = forward(model)
            for name, tensor in tensors_of(model.stages[2]):
                if not tensor.is_floating_point() or not tensor.any():
                    continue
                with torch.no_grad() if context == 'grad' else CONTEXTS[context]():
                    tensor.mul_(1.1)
                after = forward(model)
                assert not torch.equal(after['map 2'], before['map 2']), name
                before = after
            assert_close(before, outputs_with_values_of(model))

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_of_a_single_value(self, mode):
        model = backbone(mode)
        outputs_of(model, images())
        with torch.no_grad():
            module_of_block(model, 'channel_mixing.fc2').weight[7, 11] += 5
        got = outputs_of(model, images())
        assert_changed(got, unchanged_outputs(mode))
        assert_close(got, outputs_with_values_of(model))

    @pytest.mark.parametrize('mode', MODES)
    def test_vector_to_parameters(self, mode):
        """Parameters become views of one vector."""
        model, other = backbone(mode), backbone(mode, seed=1)
        outputs_of(model, images())
        vector = torch.cat([parameter.detach().reshape(-1) for parameter in other.parameters()])
        torch.nn.utils.vector_to_parameters(vector, model.parameters())
        model.load_state_dict(dict(other.named_buffers()), strict=False)
        assert_close(outputs_of(model, images(), gradients=False), float64_outputs(other, images(), gradients=False))
        vector.mul_(0.5)
        got = outputs_of(model, images(), gradients=False)
        assert_close(got, outputs_with_values_of(model) if mode != 'train' else got)

    @pytest.mark.parametrize('mode', MODES)
    def test_parameters_to_vector(self, mode):
        model = backbone(mode)
        vector = torch.nn.utils.parameters_to_vector(model.parameters())
        torch.nn.utils.vector_to_parameters(vector.detach(), model.parameters())
        assert_close(outputs_of(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_weights_of_other_strides(self, mode):
        """Transposed, channels last, slices of larger ones."""
        model = backbone(mode)
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            if value.dim() == 1:
                parameter.data = value.repeat_interleave(2)[::2]
            elif value.dim() == 2:
                parameter.data = value.t().contiguous().t()
            elif value.dim() == 4 and 'row' not in name and 'column' not in name:
                parameter.data = value.contiguous(memory_format=torch.channels_last)
            else:
                parameter.data = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = module.running_mean.repeat_interleave(2)[::2]
                module.running_var = module.running_var.repeat_interleave(2)[::2]
        assert_close(outputs_of(model, images()), unchanged_outputs(mode))
        statistics = [module.running_mean for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        reference = float64_copy(backbone(mode))
        outputs_of(reference, images().double())
        others = [module.running_mean for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]
        for got, expected in zip(statistics, others):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('mode', MODES)
    def test_weights_that_share_memory(self, mode):
        """All of the first row or value."""
        model = backbone(mode)
        for parameter in model.parameters():
            parameter.data = parameter.data[:1].expand(parameter.shape)
        reference = float64_copy(backbone(mode))
        for parameter in reference.parameters():
            parameter.data = parameter.data[:1].expand(parameter.shape).clone()
        expected = outputs_of(reference, images().double(), gradients=False)
        assert_close(outputs_of(model, images(), gradients=False), expected)
        assert_changed(expected, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_hidden_channels_cut_off(self, mode):
        """By assigning smaller tensors, as pruning of channels does; layers do not ask for their sizes."""
        model = backbone(mode)
        mixing = module_of_block(model, 'channel_mixing')
        for layer, attribute, dim in (
            ('fc1', 'weight', 0),
            ('fc1', 'bias', 0),
            ('grn', 'gamma', 0),
            ('fc2', 'weight', 1),
        ):
            module = getattr(mixing, layer)
            setattr(module, attribute, nn.Parameter(getattr(module, attribute).detach().narrow(dim, 0, 37)))
        if mixing.grn.beta is not None:
            mixing.grn.beta = nn.Parameter(mixing.grn.beta.detach()[:37])
        assert_changed(assert_matches_float64(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_shared_layers(self, mode):
        """The same layer, and the same weight, in two blocks; gradients add up."""
        models = []
        for kind in (torch.float32, torch.float64):
            model = backbone(mode).to(kind)
            first, second = model.stages[2]
            second.channel_mixing.fc1 = first.channel_mixing.fc1
            second.channel_mixing.fc2.weight = first.channel_mixing.fc2.weight
            second.strip_mixing.branches['lsmm'] = first.strip_mixing.branches['lsmm']
            models.append(model)
        got = outputs_of(models[0], images(), gradients=True)
        assert_close(got, outputs_of(models[1], images().double(), gradients=True))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_block_used_twice(self, mode):
        models = []
        for kind in (torch.float32, torch.float64):
            model = backbone(mode).to(kind)
            model.stages[2][1] = model.stages[2][0]
            models.append(model)
        assert_close(outputs_of(models[0], images()), outputs_of(models[1], images().double()))

    @pytest.mark.parametrize('shared', SHARED)
    def test_shared_layers_before_deploy(self, shared):
        """They are not folded twice."""
        model = backbone('eval')
        first, second = (block.get_submodule(shared.rpartition('.')[0]) for block in model.stages[2])
        setattr(second, shared.rpartition('.')[2], getattr(first, shared.rpartition('.')[2]))
        expected = float64_outputs(model, images())
        try:
            model.switch_to_deploy()
        except ValueError as error:
            assert 'stages.2.' in str(error)
            return
        assert_close(outputs_of(model, images()), expected)

    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_attributes_of_ones_own(self, mode):
        """Arrays and tensors that are kept in a module do not get into the way."""
        model = backbone(mode)
        for values in (numpy.zeros(3), numpy.ones(3), torch.ones(3), torch.zeros(3), [numpy.ones(2)], [numpy.zeros(2)]):
            module_of_block(model, 'channel_mixing.fc1').importance = values
            module_of_block(model, '').importance = values
            assert_close(outputs_of(model, images()), unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_shared_memory(self, mode):
        model = backbone(mode)
        outputs_of(model, images(), gradients=False)
        model.share_memory().load_state_dict(backbone(mode, seed=1).state_dict())
        assert_close(outputs_of(model, images()), float64_outputs(backbone(mode, seed=1), images()))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_module_replaced(self, mode):
        model, other = backbone(mode), backbone(mode, seed=1)
        outputs_of(model, images(), gradients=False)
        state = backbone(mode).state_dict()
        statistics = {key: state[key] for key in state if 'running' in key and not key.startswith(BLOCK)}
        for name in ('channel_mixing.fc2', 'channel_mixing', BOXES['lsmm'], 'strip_mixing', ''):
            replace_in_block(model, name, module_of_block(other, name))
            if mode == 'train':
                model.load_state_dict(statistics, strict=False)  # those of the start
            reference = float64_copy(model)
            got = outputs_of(model, images(), gradients=False)
            assert_close(got, outputs_of(reference, images().double(), gradients=False))
            assert_changed(got, unchanged_outputs(mode))

    @pytest.mark.parametrize('mode', MODES)
    def test_a_block_taken_out(self, mode):
        model = backbone(mode)
        outputs_of(model, images(), gradients=False)
        model = backbone(mode) if mode == 'train' else model
        del model.stages[2][0]
        assert_changed(assert_matches_float64(model, images()), unchanged_outputs(mode))


class TestTraining:
    @pytest.mark.parametrize(
        'optimizer',
        [
            lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
        ],
        ids=['SGD', 'AdamW', 'AdamW foreach', 'AdamW fused'],
    )
    def test_evaluation_between_steps(self, optimizer):
        """Each evaluation sees the weights and statistics of the last step, as in float64."""
        models = backbone('train'), float64_copy(backbone('train'))
        optimizers = [optimizer(model.parameters()) for model in models]
        for seed in range(2):
            for model, one in zip(models, optimizers):
                x = images(seed=seed).to(model.patch_embed.weight.dtype)
                one.zero_grad()
                (loss_of(model.train()(x)) / 100).backward()
                one.step()
            got = outputs_of(models[0].eval(), images())
            assert_close(got, outputs_with_values_of(models[0]))
            if optimizer(models[0].parameters()).defaults.get('momentum'):  # Adam's steps are signs at first
                assert_close(got, outputs_of(models[1].eval(), images().double()), tolerance=1e-3)

    def test_lbfgs(self):
        """It flattens parameters and gradients."""
        model = backbone('train')
        optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model(images())).square()
            loss.backward()
            return loss.detach()

        assert closure() > optimizer.step(closure) * 0.999 > closure()

    def test_statistics_of_all_norms(self):
        models = backbone('train'), float64_copy(backbone('train'))
        for seed in range(3):
            for model in models:
                with torch.set_grad_enabled(seed != 1):
                    model(images(seed=seed).to(model.patch_embed.weight.dtype))
        buffers = [dict(model.named_buffers()) for model in models]
        for name, expected in buffers[1].items():
            torch.testing.assert_close(buffers[0][name].to(expected), expected, rtol=1e-4, atol=1e-4, msg=name)

    @pytest.mark.parametrize('mode', MODES)
    def test_statistics_reset_between_forwards(self, mode):
        model = backbone(mode)
        outputs_of(model, images(), gradients=False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        got = outputs_of(model.eval(), images())
        assert_close(got, outputs_with_values_of(model))

    def test_deploy_form_that_trains(self):
        """Nobody should, but it is expected."""
        model = backbone('deploy').train()
        assert_matches_float64(model, images())

    def test_freezing_in_the_middle_of_a_training(self):
        model = backbone('train')
        outputs_of(model, images())
        model.load_state_dict(backbone('train').state_dict())
        module_of_block(model, '').requires_grad_(False)
        module_of_block(model, '').eval()
        assert_matches_float64(model, images())

    def test_drop_path(self):
        """Whole branches of an image, scaled; the others are those of a forward without."""
        torch.manual_seed(0)
        block = module_of_block(backbone('train', drop_path_rate=0.5), '')
        x = images(64, 32, 4, 4)
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.eval()
        with torch.no_grad():
            out = block(x)
            tokens = block.strip_mixing(x)
            kinds = [x, x + 2 * tokens]
            kinds += [kind + 2 * block.channel_mixing(kind) for kind in kinds]
        distances = torch.stack([(out - kind).abs().amax(dim=(1, 2, 3)) for kind in kinds])
        assert (distances.min(dim=0).values < 1e-3).all()
        assert distances.argmin(dim=0).unique().numel() == 4


class TestDistributed:
    @pytest.fixture(autouse=True)
    def one_process(self):
        torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize('arguments', [{}, dict(static_graph=True), dict(find_unused_parameters=True)])
    def test_data_parallel(self, arguments):
        model = nn.parallel.DistributedDataParallel(backbone('train'), gradient_as_bucket_view=True, **arguments)
        got = outputs_of(model, images())
        assert_close({name.replace('module.', ''): value for name, value in got.items()}, unchanged_outputs('train'))


class TestInferenceMode:
    @pytest.mark.parametrize('mode', MODES)
    def test_same_maps(self, mode):
        with torch.inference_mode():
            got = forward(backbone(mode))
        assert_close(got, maps_of(unchanged_outputs(mode)))

    def test_statistics(self):
        model, reference = backbone('train'), float64_copy(backbone('train'))
        with torch.inference_mode():
            forward(model)
        outputs_of(reference, images().double(), gradients=False)
        for one, other in zip(model.buffers(), reference.buffers()):
            torch.testing.assert_close(one.to(other), other, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize('mode', MODES)
    def test_training_after_it(self, mode):
        """Nothing that is cached there gets into the way of gradients."""
        model = backbone(mode).eval()
        with torch.inference_mode():
            forward(model)
        assert_close(
            outputs_of(model, images(), gradients=True),
            float64_outputs(backbone(mode).eval(), images(), gradients=True),
        )
        if mode == 'train':
            assert_close(outputs_of(model.train(), images()), unchanged_outputs('train'))

    def test_images_of_inference_mode_outside_of_it(self):
        with torch.inference_mode():
            x = images()
        for mode in MODES:
            with torch.no_grad():
                assert_close(forward(backbone(mode), x), maps_of(unchanged_outputs(mode)))


class TestThreads:
    @pytest.mark.parametrize('mode', ['eval', 'deploy'])
    def test_forwards_at_once(self, mode):
        """One model in many threads, from its first forward on."""
        model = backbone(mode)

        def work(seed):
            with torch.no_grad():
                return forward(model, images(seed=seed % 3))

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(24)))
        for seed, result in enumerate(results):
            assert_close(
                result, float64_outputs(backbone(mode), images(seed=seed % 3)) if seed < 3 else results[seed % 3]
            )

    def test_evaluation_beside_training(self):
        trained, other = backbone('train'), backbone('eval')
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(outputs_of, model, images()) for model in (trained, other)]
        assert_close(jobs[0].result(), unchanged_outputs('train'))
        assert_close(jobs[1].result(), unchanged_outputs('eval'))
