"""The deploy form: what is folded, and accelerated stages, which run as one operator."""

import pytest
import torch
from helpers import HAS_OPERATORS, operators_of, randomise, small_backbone
from torch import nn

import mmstrip
from mmstrip import ops
from mmstrip.ops.stage import FastStage, _packed

ALL = dict(out_indices=(0, 1, 2, 3))
VARIANTS = [
    *(dict(cascade=False), dict(branches='cgsmm'), dict(branches='lsmm')),
    *(dict(act_cfg=dict(type='ReLU')), dict(norm_cfg=dict(type='GN', num_groups=2))),
]
needs_operators = pytest.mark.skipif(not HAS_OPERATORS, reason=ops.status())


class TestFolding:
    @pytest.mark.parametrize('arguments', [{}, dict(strip_width=5, num_patches=8), *VARIANTS], ids=str)
    def test_same_features_and_a_state_dict_that_loads(self, arguments):
        model = randomise(small_backbone(**ALL, **arguments)).eval()
        x = torch.rand(2, 3, 97, 75)
        with torch.no_grad():
            expected = model(x)
            model.switch_to_deploy()
            model.switch_to_deploy()  # once more changes nothing
            features = model(x)
            other = small_backbone(**ALL, deploy=True, **arguments).eval()
            other.load_state_dict(model.state_dict())
            for got, same, reference in zip(features, other(x), expected):
                torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(got, same, rtol=0, atol=0)

    def test_forms_are_not_mixed_up(self):
        trained, deployed = small_backbone(), small_backbone(deploy=True)
        for model, state_dict in ((trained, deployed.state_dict()), (deployed, trained.state_dict())):
            with pytest.raises(ValueError, match='deploy=(True|False)'):
                model.load_state_dict(state_dict, strict=False)


def deployed(**arguments):
    """Accelerated, then folded, in evaluation mode."""
    model = mmstrip.accelerate(randomise(small_backbone(**arguments)).eval())
    model.switch_to_deploy()
    return model


def packed_stages(model, x):
    """How many stages run as one operator."""
    count = 0

    def look(stage, inputs):
        nonlocal count
        count += isinstance(stage, FastStage) and stage.deploy and stage._pack(inputs[0]) is not None

    with torch.no_grad():
        hooks = [stage.register_forward_pre_hook(look) for stage in model.stages]
        model(x)
    for hook in hooks:
        hook.remove()
    return count


@needs_operators
def test_weights_are_packed_once_and_go_with_their_model():
    model = deployed(**ALL)
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
        packed = [_packed[stage] for stage in model.stages]
        model(torch.rand(2, 3, 96, 64))
    assert all(_packed[stage] is one and one.operator is not None for stage, one in zip(model.stages, packed))
    count = len(_packed)
    del model
    assert len(_packed) == count - 4


@needs_operators
class TestWhereBlocksAreCalled:
    X = torch.rand(1, 3, 64, 64)

    def test_with_gradients(self):
        model = deployed()
        assert not any(stage._pack(torch.rand(1, 16 << i, 16, 16)) for i, stage in enumerate(model.stages))
        model(self.X)[0].sum().backward()
        assert all(parameter.grad is not None for parameter in model.stages.parameters())

    @pytest.mark.parametrize('arguments', VARIANTS, ids=str)
    def test_of_variants(self, arguments):
        assert packed_stages(deployed(**arguments), self.X) == 0

    def test_of_trained_models(self, monkeypatch):
        """Nothing is tried."""
        monkeypatch.setattr(FastStage, '_pack', None)
        model = mmstrip.accelerate(small_backbone().eval())
        with torch.no_grad():
            assert operators_of(lambda: model(self.X))

    def test_on_maps_smaller_than_windows(self):
        assert packed_stages(deployed(), torch.rand(1, 3, 64, 50)) == 0

    def test_where_a_norm_was_put_back(self):
        model = deployed()
        model.stages[2][1].strip_mixing.project[1] = nn.BatchNorm2d(64).eval()
        assert packed_stages(model, self.X) == 3

    def test_where_a_layer_mixes_along_the_other_axis(self):
        model = deployed(**ALL)
        model.stages[1][0].strip_mixing.branches['cgsmm'].row.axis = 'column'
        assert packed_stages(model, self.X) == 3
