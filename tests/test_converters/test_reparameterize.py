"""The deploy form of a trained model, as a tool makes it."""

import pytest
import torch
from helpers import SMALL_CONFIG
from helpers.runs import run_here
from mmengine.registry import MODELS, init_default_scope

from mmstrip.converters.reparameterize import convert_to_deploy
from mmstrip.utils.config import load_config

CONVERTER = 'model_converters/reparameterize_model.py'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    config = load_config(str(SMALL_CONFIG))
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    path = tmp_path_factory.mktemp('deploy') / 'trained.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return model, path


def test_outputs_stay(trained, tmp_path, capsys):
    model, path = trained
    run_here(CONVERTER, SMALL_CONFIG, path, tmp_path / 'deploy.pth')
    assert 'model.backbone.deploy=True' in capsys.readouterr().out
    config = load_config(str(SMALL_CONFIG), {'model.backbone.deploy': True})
    deployed = MODELS.build(config.model).eval()
    state_dict = torch.load(tmp_path / 'deploy.pth', weights_only=True)['state_dict']
    deployed.load_state_dict(state_dict)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(deployed(images), model(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='deploy=True'):
        convert_to_deploy(str(SMALL_CONFIG), str(tmp_path / 'deploy.pth'), str(tmp_path / 'again.pth'))
    assert not (tmp_path / 'again.pth').exists()


def test_bad_input_is_named(trained, tmp_path):
    model, _ = trained
    state_dict = {k: v for k, v in model.state_dict().items() if not k.startswith('head')}
    torch.save(state_dict, tmp_path / 'part.pth')
    with pytest.raises(ValueError, match='lacks 2 of .* head'):
        convert_to_deploy(str(SMALL_CONFIG), str(tmp_path / 'part.pth'), str(tmp_path / 'out.pth'))
    with pytest.raises(SystemExit, match='Error: no checkpoint at'):
        run_here(CONVERTER, SMALL_CONFIG, tmp_path / 'none.pth', tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()
