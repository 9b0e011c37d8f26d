"""The backbone as its users meet it."""

import copy
import itertools
import logging

import pytest
import torch
from helpers import SMALL_ARCH, randomise, small_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.runner import load_checkpoint
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

import mmstrip
from mmstrip.models import StripMLP
from mmstrip.models.padding import image_ends, valid_tokens
from mmstrip.models.state_dict import resample_strips, resample_table
from mmstrip.models.strip_mixing import CascadeGroupStripMixing, RelativePosition, StripMLPLayer

# Parameters with 1000 classes, and the patches of the first stage: a patch has 2 channels, or 4.
PAPER = {
    'tiny-light': (18_243_920, 20),
    'tiny': (24_903_920, 20),
    'small': (42_568_600, 12),
    'base': (57_216_480, 14),
}


@pytest.mark.parametrize('arch', PAPER)
def test_published_sizes(arch):
    with torch.device('meta'):
        model = StripMLP(arch)
    head = (model.embed_dims * 8 + 1) * 1000
    patches = [stage[0].strip_mixing.branches['cgsmm'].row.weight.shape[0] for stage in model.stages]
    assert (sum(p.numel() for p in model.parameters()) + head, patches[0]) == PAPER[arch]
    assert patches == [patches[0] * 2**i for i in range(4)]


@given(height=st.integers(32, 200), width=st.integers(32, 200))
@settings(max_examples=15)
def test_any_size_gives_floored_strides(height, width):
    model = small_backbone(out_indices=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, height, width))
    for i, feature in enumerate(maps):
        stride = 4 * 2**i
        assert feature.shape == (1, 16 * 2**i, height // stride, width // stride)
        assert torch.isfinite(feature).all()


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (2, 0), (0, 1, 2, 3)])
def test_out_indices_choose_from_the_same_maps(out_indices):
    full = randomise(small_backbone(out_indices=(0, 1, 2, 3))).eval()
    model = small_backbone(out_indices=out_indices)
    model.load_state_dict({key: value for key, value in full.state_dict().items() if key in model.state_dict()})
    x = torch.rand(2, 3, 64, 96)
    for i, feature in zip(out_indices, model.eval()(x)):
        torch.testing.assert_close(feature, full(x)[i])
    # Nothing is built that the outputs do not need, so that no parameter is left without a gradient.
    assert len(model.stages) == max(out_indices) + 1
    sum(feature.sum() for feature in model.train()(x)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert small_backbone(out_indices=[i - 4 for i in out_indices]).out_indices == out_indices
    assert small_backbone(out_indices=out_indices[0]).out_indices == out_indices[:1]


def test_rectangular_training_size():
    model = small_backbone(img_size=(64, 128))
    layers = [module for module in model.stages[0].modules() if isinstance(module, StripMLPLayer)]
    assert [(layer.axis, layer.weight.shape[-1]) for layer in layers] == [('row', 32), ('column', 16)]
    tables = [module.table.shape[0] for module in model.stages[0].modules() if isinstance(module, RelativePosition)]
    assert tables == [2 * 16 + 1, 2 * 32 + 1]
    assert model(torch.rand(2, 3, 64, 128))[0].shape == (2, 128, 2, 4)


VARIANTS = [
    *(dict(strip_width=1), dict(strip_width=5), dict(num_patches=1), dict(num_patches=(8, 16, 32, 64))),
    *(dict(cascade=False), dict(branches='cgsmm'), dict(branches=['lsmm']), dict(mlp_ratio=2), dict(in_channels=1)),
    *(dict(act_cfg=dict(type='ReLU')), dict(norm_cfg=dict(type='GN', num_groups=2))),
]


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_variants_of_the_ablations(variant):
    """Gradients reach every parameter."""
    model = randomise(small_backbone(**variant, drop_path_rate=0.0))
    (out,) = model(torch.rand(2, variant.get('in_channels', 3), 96, 80))
    assert out.shape == (2, 128, 3, 2)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        taken_away = name.endswith('project.0.bias')  # BN subtracts it again with the mean
        assert parameter.grad is not None and (taken_away or parameter.grad.abs().sum() > 0), name


def test_features_do_not_depend_on_batch_mates():
    model = randomise(small_backbone(out_indices=(0, 1, 2, 3))).eval()
    images = torch.rand(3, 3, 96, 72)
    for together, alone in zip(model(images), model(images[1:2])):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('padding', [False, True])
def test_checkpointing_changes_nothing_but_memory(padding):
    """Drop path drops the same branches, and BN statistics count the batch once."""
    results, images = [], padded_images()
    for with_cp in (False, True):
        torch.manual_seed(1)
        model = randomise(small_backbone(drop_path_rate=0.3, out_indices=2, ignore_padding=padding, with_cp=with_cp))
        out = model(images)[0]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append({**{name: p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert results[0]['patch_embed.weight'].abs().max() > 1


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages_stay_as_they_are(frozen_stages):
    model = small_backbone(frozen_stages=frozen_stages, drop_path_rate=0.0)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)], lr=0.1)
    model.train()
    out = model(torch.rand(4, 3, 64, 64))[0]
    if frozen_stages < 4:
        out.square().sum().backward()
        optimizer.step()
    frozen = ['patch_embed.'] if frozen_stages >= 0 else []
    for i in range(frozen_stages):
        frozen += [f'stages.{i}.', f'cross_stage.{i}.', f'merging.{i - 1}.']
    frozen += ['norm.'] if frozen_stages == 4 else []
    for name, value in model.state_dict().items():
        still = torch.equal(value, before[name])
        if name.startswith(tuple(frozen)):
            assert still, name
        elif name.endswith(('running_mean', 'weight')):
            assert not still, name


def test_norm_eval_keeps_all_statistics():
    model = small_backbone(norm_eval=True).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.rand(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(p.requires_grad for p in model.parameters())
    small = small_backbone().train()
    assert all(m.training for m in small.modules() if isinstance(m, _BatchNorm))


def test_drop_path_rates_and_statistics():
    rates = lambda model: [block.drop_path.drop_prob for stage in model.stages for block in stage]  # noqa: E731
    assert rates(small_backbone(drop_path_rate=0.2)) == [0.2] * 5
    assert rates(small_backbone(drop_path_rate=0.2, drop_path_ramp=True)) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    block = small_backbone(drop_path_rate=0.25).stages[0][0].train()
    branch = torch.ones(20_000, 1, 1, 1)
    dropped = block.drop_path(branch)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 1 / 0.75])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(block.eval().drop_path(branch), branch)


def test_layer_depths_grow_along_the_network():
    model = small_backbone()
    depths = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.') for name, _ in model.named_parameters()}
    assert all(total == 7 for _, total in depths.values())
    depth = {name: value for name, (value, _) in depths.items()}
    assert depth['patch_embed.weight'] == 0
    assert depth['stages.0.0.channel_mixing.fc1.weight'] == 1
    assert depth['stages.2.1.channel_mixing.fc1.weight'] == 4
    assert depth['merging.1.weight'] == depth['cross_stage.2.0.weight'] == 3
    for name in ('merging.2.weight', 'cross_stage.3.1.weight', 'stages.3.0.channel_mixing.fc1.bias'):
        assert depth[name] == 5
    assert depth['norm.weight'] == 6 and model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)


def test_checkpoints_say_how_much_they_hold(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('mmstrip.models.state_dict.print_log', lambda text, *args, **_: said.append((text, *args)))
    model = small_backbone()
    weights = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    torch.save(weights, tmp_path / 'weights.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'), prefix='backbone.')
    small_backbone(init_cfg=init).init_weights()
    total = sum('num_batches' not in key for key in weights)
    assert said == [(f'StripMLP: the checkpoint has {total} of {total} tensors',)]
    weights.pop('backbone.patch_embed.weight')
    model.load_state_dict({key.removeprefix('backbone.'): value for key, value in weights.items()}, strict=False)
    text, _, level = said[1]
    assert level == logging.WARNING
    assert text == f'StripMLP: the checkpoint has {total - 1} of {total} tensors; missing are patch_embed.weight'
    with pytest.raises(FileNotFoundError, match='init_cfg: no checkpoint at .*gone.pth. docs/model_zoo.md describes'):
        small_backbone(init_cfg=dict(init, checkpoint=str(tmp_path / 'gone.pth'))).init_weights()


def test_compiles_once_for_many_sizes():
    """One graph serves all maps that need windows, another one those of few windows: PyTorch's convolution chooses its
    way by the number of images."""
    counter = CompileCounterWithBackend('eager')
    torch._dynamo.reset()
    module = randomise(CascadeGroupStripMixing(8, (4, 5), num_patches=4)).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for height, width in ((6, 9), (13, 7), (40, 31), (12, 6)):
            x = torch.rand(2, 8, height, width)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


class TestLoadingAtAnotherSize:
    """Weights of another img_size are resampled."""

    def test_it_is_done_and_said(self, monkeypatch, tmp_path):
        """Also inside of a larger model, through mmengine; of the same size, weights are loaded as they are."""
        model, said = torch.nn.Module(), []
        model.backbone = randomise(small_backbone(img_size=64))
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'c.pth')
        monkeypatch.setattr('mmstrip.models.state_dict.print_log', lambda text, **_: said.append(text))
        monkeypatch.setattr('mmstrip.models.strip_mlp.report_coverage', lambda *arguments: None)
        pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'c.pth'), prefix='backbone.')
        for img_size, table in ((64, slice(None)), ((128, 128), slice(None, None, 2))):
            other = small_backbone(img_size=img_size, init_cfg=pretrained)
            other.init_weights()
            for name, value in model.backbone.state_dict().items():
                if 'position' in name:
                    torch.testing.assert_close(other.state_dict()[name][table], value)
                elif img_size == 64 or not name.endswith(('row.weight', 'row.bias', 'column.weight', 'column.bias')):
                    assert torch.equal(other.state_dict()[name], value), name
        assert len(said) == 1 and said[0].startswith(
            'Resampled the weights of 10 strip MLP layers and 10 position tables to img_size (128, 128)'
        )

    @pytest.mark.parametrize('new', [4, 6, 12, 16, 24])
    def test_strip_weights_keep_their_effect_on_smooth_maps(self, new):
        old = 8
        source, target = StripMLPLayer(old, 2), StripMLPLayer(new, 2)
        grid = torch.linspace(-1, 1, old)
        with torch.no_grad():  # a smooth kernel, as trained ones are
            source.weight.copy_(torch.cos(grid[:, None] - 2 * grid)[None, None])
            source.bias.copy_(grid[None])
        state = source.state_dict()
        assert resample_strips(target, state, '')
        target.load_state_dict(state)
        x = torch.rand(1, 2, 5, 1)
        before, after = source(x.expand(-1, -1, -1, old)), target(x.expand(-1, -1, -1, new))
        resized = torch.nn.functional.interpolate(before, (5, new), mode='bicubic', antialias=True)
        assert (after - resized).abs().max() < 0.06 * resized.abs().max()

    def test_tables_keep_their_ends_and_centre(self):
        source, target = RelativePosition(3, (4, 4), 4), RelativePosition(3, (8, 8), 8)
        state = source.state_dict()
        assert resample_table(target, state, '')
        for old, new in ((0, 0), (2, 4), (4, 8), (8, 16)):
            torch.testing.assert_close(state['table'][new], source.table[old])


class TestBadInput:
    """One sentence that names the argument, what it got and what is allowed."""

    @pytest.mark.parametrize(
        'arguments, words',
        [
            (dict(arch='huge'), "arch must be one of tiny-light, tiny, small, base, or a dict, but got 'huge'"),
            (dict(arch=dict(embed_dims=16)), 'arch must be a name or a dict with depths and embed_dims'),
            (dict(arch=dict(embed_dims=15, depths=(1, 1, 1, 1))), 'embed_dims must be even'),
            (
                dict(arch=dict(embed_dims=12, depths=(1, 1, 1, 1))),
                'embed_dims must be such .* a multiple of 4 channels',
            ),
            (dict(arch=dict(embed_dims=-8, depths=(1, 1, 1, 1))), 'embed_dims must be a positive int, but got -8'),
            (dict(arch=dict(embed_dims=16, depths=(1, 1, 1))), r'depths must be 4 positive ints, but got \(1, 1, 1\)'),
            (dict(arch=dict(embed_dims=16, depths=(1, 1, 0, 1))), 'depths must be 4 positive ints'),
            (dict(out_indices=(0, 4)), r'out_indices must be .* from -4 to 3, but got \(0, 4\)'),
            (dict(out_indices=()), 'out_indices must be'),
            (dict(frozen_stages=5), 'frozen_stages must be an int from -1 to 4, but got 5'),
            (dict(strip_width=2), 'strip_width must be an odd positive int, but got 2'),
            (dict(img_size=100), 'img_size must be .* positive multiples of 32, but got 100'),
            (dict(img_size=0), 'img_size must be'),
            (dict(drop_path_rate=1.0), r'drop_path_rate must be a number in \[0, 1\), but got 1.0'),
            (dict(num_patches=3), 'num_patches must be a divisor of the 8 channels of CGSMM in stage 0, but got 3'),
            (dict(num_patches=(1, 1)), 'num_patches must be an int or 4 ints'),
            (dict(arch=dict(SMALL_ARCH, num_patches=2), num_patches=4), 'num_patches is 4, but arch sets it to 2'),
            (dict(branches=('cgsmm', 'mlp')), 'branches must be one or both of cgsmm, lsmm'),
            (dict(in_channels=0), 'in_channels must be a positive int'),
            (dict(mlp_ratio=0.01), 'mlp_ratio must be .* at least one hidden channel, but got 0.01'),
            (dict(mlp_ratio=float('inf')), 'mlp_ratio must be a finite number .* but got inf'),
            (dict(drop_path_rate='0.1'), "drop_path_rate must be .* but got '0.1'"),
            (dict(out_indices=None), 'out_indices must be .* but got None'),
            (dict(branches=None), 'branches must be .* but got None'),
            (dict(branches=[['lsmm']]), 'branches must be one or both of cgsmm, lsmm'),
            (dict(branches='lsmm', arch=dict(embed_dims=1, depths=(1, 1, 1, 1))), 'embed_dims must be at least 2, but'),
            (dict(norm_cfg=None), 'norm_cfg must be a dict with a type, but got None'),
            (dict(act_cfg='GELU'), "act_cfg must be a dict with a type, but got 'GELU'"),
            (dict(frozen_stages=True), 'frozen_stages must be .* but got True'),
            *((dict(ignore_padding=wrong), 'ignore_padding must be True or False') for wrong in ('no', 1, None)),
            *(
                ({name: 'parallel'}, f"{name} must be True or False, but got 'parallel'")
                for name in ('cascade', 'drop_path_ramp', 'norm_eval', 'with_cp', 'deploy')
            ),
        ],
    )
    def test_arguments(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            small_backbone(**arguments)

    @pytest.mark.parametrize('shape', [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64), (1, 3, 64, 20)])
    def test_images(self, shape):
        words = rf'shape \(N, 3, H, W\) with H and W at least 32, but got \({", ".join(map(str, shape))}\)'
        with pytest.raises(ValueError, match=words):
            small_backbone()(torch.rand(shape))
        with pytest.raises(TypeError, match='takes a tensor of images, but got list'):
            small_backbone()([torch.rand(shape)])

    @pytest.mark.parametrize(
        'other, words',
        [
            (dict(arch=dict(embed_dims=32, depths=(1, 1, 2, 1))), 'has embed_dims=32, .* the model has embed_dims=16'),
            (dict(arch=dict(embed_dims=16, depths=(1, 1, 3, 1))), r'depths\[2\]=3, but the model has depths\[2\]=2'),
            (dict(num_patches=1), r'num_patches\[0\]=1'),
            (dict(strip_width=1), 'strip_width=1, but the model has strip_width=3'),
            (dict(in_channels=1), 'in_channels=1, but the model has in_channels=3; docs/model_zoo.md'),
            (dict(mlp_ratio=2), r'fc1.weight has shape \(32, 16\), but that of the model has \(48, 16\)'),
            (dict(branches='lsmm'), r'lsmm.tall.weight has shape \(16, 1, 7, 3\)'),
        ],
    )
    def test_checkpoint_of_another_arch(self, other, words, tmp_path):
        """Also through mmengine's loader, which would only warn of other shapes."""
        model = torch.nn.Module()
        model.backbone = small_backbone(**{'arch': SMALL_ARCH, **other})
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'other.pth')
        model.backbone = small_backbone()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=words):
            load_checkpoint(model, str(tmp_path / 'other.pth'))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_checkpoint_of_another_network(self, tmp_path):
        torch.save({'state_dict': {'conv1.weight': torch.zeros(64, 3, 7, 7)}}, tmp_path / 'resnet.pth')
        with pytest.raises(ValueError, match='holds nothing of this StripMLP; its first keys are conv1.weight'):
            load_checkpoint(small_backbone(), str(tmp_path / 'resnet.pth'))
        # A whole model's checkpoint without the prefix of its backbone would leave the weights at random too.
        whole = {f'backbone.{key}': value for key, value in small_backbone().state_dict().items()}
        torch.save({'state_dict': whole}, tmp_path / 'whole.pth')
        pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'whole.pth'))
        with pytest.raises(ValueError, match="with prefix='backbone.'"):
            small_backbone(init_cfg=pretrained).init_weights()

    def test_misshapen_strip_weights_are_not_resampled(self):
        state = small_backbone().state_dict()
        key = 'stages.0.0.strip_mixing.branches.cgsmm.row.weight'
        state[key] = state[key][:, :, :5, :7]
        with pytest.raises(ValueError, match=r'row.weight has shape \(2, 3, 5, 7\)'):
            small_backbone().load_state_dict(state)

    def test_values_that_are_not_tensors(self):
        state = {key: value.numpy() for key, value in small_backbone().state_dict().items()}
        with pytest.raises(ValueError, match='is damaged: norm.weight must be a tensor, but is of type ndarray'):
            small_backbone().load_state_dict(state)

    def test_parts_of_a_state_dict_are_welcome(self):
        model = small_backbone()
        part = {'stages.2.1.channel_mixing.fc1.bias': torch.ones(192)}
        model.load_state_dict(part, strict=False)
        assert torch.equal(model.stages[2][1].channel_mixing.fc1.bias, torch.ones(192))


@given(height=st.integers(33, 96), width=st.integers(33, 96), data=st.data())
@settings(max_examples=10, deadline=None)
def test_ends_of_images_are_found(height, width, data):
    ends = [(data.draw(st.integers(1, height)), data.draw(st.integers(1, width))) for _ in range(2)]
    images = torch.zeros(2, 3, height, width)
    for image, (rows, columns) in zip(images, ends):
        image[1, :rows, :columns] = torch.randn(rows, columns)
        image[:, : rows // 2] = 0  # black above is no padding
    assert image_ends(torch.zeros(1, 3, 40, 50)) is None  # an image of zeros counts as a whole
    found = image_ends(images)
    if found is None:
        assert ends == [(height, width)] * 2
        return
    assert list(zip(*(end.tolist() for end in found))) == ends
    tokens = valid_tokens(found, torch.empty(2, 8, height // 8, width // 8), stride=8)['valid']
    for mask, (rows, columns) in zip(tokens, ends):
        assert mask.sum() == min(-(-rows // 8), height // 8) * min(-(-columns // 8), width // 8)
        assert mask[0, 0, 0] == 1


def padded_images():
    images = torch.randn(2, 3, 128, 96)
    images[0, :, 64:] = images[0, :, :, 64:] = 0
    return images


@pytest.mark.parametrize('deploy', [False, True])
def test_ignored_padding_changes_padded_images_alone(deploy):
    usual = randomise(small_backbone()).eval()
    model = small_backbone(ignore_padding=True).eval()
    model.load_state_dict(usual.state_dict())
    if deploy:
        usual.switch_to_deploy(), model.switch_to_deploy()
    images = padded_images()
    with torch.no_grad():
        before, after = usual(images)[0], model(images)[0]
        torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-5)
        assert (after[0] - before[0]).abs().max() > 1e-3
        assert torch.equal(model(images[1:])[0], usual(images[1:])[0])
        torch.testing.assert_close(mmstrip.accelerate(model)(images)[0], after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'part', ['0', '0.0', '0.0.strip_mixing', '0.0.strip_mixing.branches.lsmm', '0.0.channel_mixing.grn']
)
def test_ignored_padding_refuses_modules_that_average_all(part):
    for ignore_padding in (False, True):
        model = small_backbone(ignore_padding=ignore_padding)
        parent, _, name = f'stages.{part}'.rpartition('.')
        setattr(model.get_submodule(parent), name, torch.nn.Identity())
        if ignore_padding:
            with pytest.raises(TypeError, match=rf'ignore_padding=True .* stages.{part} \(Identity\) does not'):
                model.eval()
        else:
            model.eval()


@pytest.mark.parametrize('branches', ['cgsmm', 'lsmm'])
def test_ignored_padding_with_one_branch_and_traced(branches):
    model = randomise(small_backbone(ignore_padding=True, branches=branches)).eval()
    usual = small_backbone(branches=branches).eval()
    usual.load_state_dict(model.state_dict())
    images = padded_images()
    with torch.no_grad():
        expected = model(images)[0]
        assert (expected[0] - usual(images)[0][0]).abs().max() > 1e-4
        torch.testing.assert_close(torch.jit.trace(model, images, check_trace=False)(images)[0], expected)


def test_ignored_padding_compiles():
    model, images = randomise(small_backbone(ignore_padding=True, out_indices=0)).eval(), padded_images()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(images), model(images))


def test_cross_stage_maps_are_nchw_on_gpus_alone():
    """In channels_last memory cuDNN would take these convolutions' gradients channel by channel."""

    def layouts(device):
        model = small_backbone()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=device)
            found = []
            for conv in itertools.chain(*model.cross_stage):
                conv.register_forward_pre_hook(lambda _, maps: found.append(maps[0].is_contiguous()))
            model.stages[3].register_forward_pre_hook(
                lambda _, maps: found.append(maps[0].is_contiguous(memory_format=torch.channels_last))
            )
            model(torch.empty(2, 3, 64, 64, device=device))
        return found

    assert layouts('cuda') == [True, True, True, True]
    assert layouts('cpu') == [False, False, False, True]
