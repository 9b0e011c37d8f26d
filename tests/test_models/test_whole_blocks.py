"""Whole blocks in one operator against the same blocks step by step."""

import copy
import pickle

import pytest
import torch
from helpers import randomise, small_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmstrip.models import native, whole_blocks

pytestmark = pytest.mark.skipif(not native.in_use(), reason='the operators are not compiled')

ALL = dict(out_indices=(0, 1, 2, 3))


@pytest.fixture
def runs(monkeypatch):
    """How often blocks were asked to run whole, and how often they did."""
    counts = dict(asked=0, done=0)
    original = whole_blocks.run

    def run(*arguments, **options):
        out = original(*arguments, **options)
        counts['asked'] += 1
        counts['done'] += out is not None
        return out

    monkeypatch.setattr(whole_blocks, 'run', run)
    return counts


def step_by_step(model, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_blocks, 'run', lambda *arguments, **options: None)
        return model(x)


def assert_same(model, x):
    with torch.no_grad():
        for got, expected in zip(model(x), step_by_step(model, x)):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * max(1, expected.abs().max().item()))


@given(
    size=st.sampled_from([(64, 64), (96, 64), (65, 130), (128, 200)]),
    images=st.integers(1, 5),
    strip_width=st.sampled_from([1, 3, 5]),
    embed_dims=st.sampled_from([8, 24, 40]),
    deploy=st.booleans(),
)
@settings(max_examples=25)
def test_same_as_step_by_step(size, images, strip_width, embed_dims, deploy):
    arch = dict(embed_dims=embed_dims, depths=(1, 1, 2, 1))
    model = randomise(small_backbone(arch=arch, strip_width=strip_width, deploy=deploy, **ALL)).eval()
    assert_same(model, torch.rand(images, 3, *size))


@pytest.mark.parametrize('deploy', [True, False])
@pytest.mark.parametrize('threads', [1, 2, 3, 16])
def test_any_number_of_threads(threads, deploy, runs):
    """Images go side by side where there are enough of them for the threads: 196 pixels a thread are enough."""
    model = randomise(small_backbone(deploy=deploy, **ALL)).eval()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for images in (1, 4, 7, 33):
            assert_same(model, torch.rand(images, 3, 64, 64))
    finally:
        torch.set_num_threads(before)
    assert runs['done'] == runs['asked'] == 4 * (4 if deploy else 5)


def test_of_stages_that_are_frozen(runs):
    """Gradients of the others are wanted, theirs are not."""
    model = randomise(small_backbone(frozen_stages=2, drop_path_rate=0.0)).train()
    x = torch.rand(2, 3, 64, 64)
    model(x)[0].sum().backward()
    assert runs['done'] == 2
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    step_by_step(model, x)[0].sum().backward()
    others = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    for got, expected in zip(gradients, others):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * max(1, expected.abs().max().item()))


class TestWhatIsKeptOfTheDeployForm:
    @pytest.fixture
    def model(self):
        return randomise(small_backbone(deploy=True, **ALL)).eval()

    @torch.no_grad()
    def test_it_is_used_again(self, model):
        x = torch.rand(1, 3, 64, 64)
        model(x)
        kept = [whole_blocks._kept[stage].stage for stage in model.stages]
        model(torch.rand(2, 3, 96, 64))
        assert all(whole_blocks._kept[stage].stage is one for stage, one in zip(model.stages, kept))

    @pytest.mark.parametrize('change', ['in place', 'loaded', 'replaced', 'converted', 'module replaced'])
    @torch.no_grad()
    def test_it_is_renewed_by_changes(self, model, change):
        x = torch.rand(1, 3, 64, 64)
        before = model(x)[0]
        mixing = model.stages[0][0].channel_mixing
        if change == 'in place':
            mixing.fc2.weight.mul_(2)
        elif change == 'loaded':
            model.load_state_dict(randomise(small_backbone(deploy=True, **ALL), seed=1).state_dict())
        elif change == 'replaced':
            mixing.fc2.weight = nn.Parameter(mixing.fc2.weight * 2)
        elif change == 'converted':
            model.bfloat16().float()
        else:
            mixing.fc2 = nn.Linear(mixing.fc2.in_features, mixing.fc2.out_features)
        assert not torch.equal(model(x)[0], before)
        assert_same(model, x)

    @torch.no_grad()
    def test_it_is_no_part_of_the_model(self, model):
        x = torch.rand(1, 3, 64, 64)
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for got, same in zip(other(x), expected):
                torch.testing.assert_close(got, same, rtol=0, atol=0)
        count = len(whole_blocks._kept)
        del other
        assert len(whole_blocks._kept) < count  # it goes with its model


class TestWhereBlocksRunStepByStep:
    def test_with_gradients(self, runs):
        model = small_backbone().eval()
        model(torch.rand(1, 3, 64, 64))[0].sum().backward()
        assert runs['asked'] and not runs['done']

    @torch.no_grad()
    def test_in_training(self, runs):
        model = small_backbone(deploy=True).eval()
        model.stages[0][0].strip_mixing.depthwise[0].train()
        model(torch.rand(1, 3, 64, 64))
        assert runs['done'] == 3  # of the stages

    @pytest.mark.parametrize('deploy', [True, False])
    @torch.no_grad()
    def test_with_hooks(self, runs, deploy):
        model = small_backbone(deploy=deploy).eval()
        seen = []
        model.stages[2][1].strip_mixing.register_forward_hook(lambda module, x, y: seen.append(y.shape))
        model(torch.rand(1, 3, 64, 64))
        assert seen == [(1, 64, 4, 4)]
        assert 0 < runs['done'] < runs['asked']

    @torch.no_grad()
    def test_with_hooks_on_all_modules(self, runs):
        model = small_backbone().eval()
        with nn.modules.module.register_module_forward_hook(lambda module, x, y: None):
            model(torch.rand(1, 3, 64, 64))
        assert not runs['done']

    @pytest.mark.parametrize(
        'arguments',
        [
            dict(cascade=False),
            dict(branches='cgsmm'),
            dict(branches='lsmm'),
            dict(act_cfg=dict(type='ReLU')),
            dict(norm_cfg=dict(type='GN', num_groups=2)),
        ],
    )
    @pytest.mark.parametrize('deploy', [True, False])
    @torch.no_grad()
    def test_with_other_steps(self, runs, arguments, deploy):
        model = small_backbone(deploy=deploy, **arguments).eval()
        model(torch.rand(1, 3, 64, 64))
        assert runs['asked'] and not runs['done']

    @pytest.mark.parametrize('deploy', [True, False])
    @torch.no_grad()
    def test_with_layers_that_were_changed(self, runs, deploy):
        """Weights that are computed, and layers in place of others."""
        model = randomise(small_backbone(deploy=deploy, **ALL)).eval()
        x = torch.rand(1, 3, 64, 64)
        before = model(x)[0]
        done = runs['done']

        class Twice(nn.Module):
            def forward(self, weight):
                return 2 * weight

        class Wrapped(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            @property
            def weight(self):
                return 2 * self.layer.weight

        for block in (stage[0] for stage in model.stages):
            nn.utils.parametrize.register_parametrization(block.channel_mixing.fc2, 'weight', Twice())
            block.strip_mixing.fuse = Wrapped(block.strip_mixing.fuse)
        after = model(x)[0]
        assert not torch.allclose(after, before)
        assert runs['done'] == done + 1  # one block of the third stage is as it was

    @torch.no_grad()
    def test_on_maps_smaller_than_windows(self, runs):
        model = randomise(small_backbone(**ALL)).eval()
        assert_same(model, torch.rand(1, 3, 64, 50))
        assert not runs['done']


def test_blocks_that_do_not_fit_are_refused():
    block = small_backbone().eval().stages[0][0]
    with torch.no_grad():
        tensors = whole_blocks._tensors(block)
        stage = torch.classes.mmstrip.Stage([dict(tensors, position_row=torch.zeros(8, 16, 16))], 1e-5, 1e-5, 1e-6)
        with pytest.raises(RuntimeError, match='do not fit'):
            stage.run(torch.rand(8, 16, 8, 8), (1, 1), (0, 0))
        with pytest.raises(RuntimeError, match='a block without'):
            torch.classes.mmstrip.Stage([{}], 1e-5, 1e-5, 1e-6)
