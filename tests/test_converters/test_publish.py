"""Files to publish, and the one that is published here."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL_CONFIG
from helpers.configs import LISTED
from helpers.runs import run_here
from mmengine.registry import MODELS, init_default_scope
from safetensors import safe_open
from safetensors.torch import load_file

from mmstrip.converters.publish import publish_model
from mmstrip.utils.config import load_config

DIGITS = 'strip-mlp-pico_1xb64_digits-64px'
WEIGHTS = ROOT / 'demo' / f'{DIGITS}.safetensors'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A model as a training leaves it."""
    config = load_config(str(SMALL_CONFIG))
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    path = tmp_path_factory.mktemp('publish') / 'epoch_1.pth'
    meta = dict(dataset_meta=dict(classes=tuple('0123456789')), epoch=1)
    torch.save(dict(state_dict=model.state_dict(), meta=meta, optimizer=dict(state={0: torch.ones(9)})), path)
    return model, path


def test_weights_and_classes_alone(trained, tmp_path, capsys):
    model, path = trained
    run_here('model_converters/publish_model.py', SMALL_CONFIG, path, tmp_path / 'full.pth')
    assert 'digits_small, names of 10 classes' in capsys.readouterr().out
    full = torch.load(tmp_path / 'full.pth', weights_only=True)
    assert set(full) == {'state_dict', 'meta'}
    assert full['meta']['config'] == 'digits_small' and set(full['meta']) == {'config', 'dataset_meta'}
    assert all(torch.equal(value, full['state_dict'][key]) for key, value in model.state_dict().items())
    run_here('model_converters/publish_model.py', SMALL_CONFIG, path, tmp_path / 'half.safetensors', '--half')
    half = load_file(tmp_path / 'half.safetensors')
    for key, value in model.state_dict().items():
        assert half[key].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
        torch.testing.assert_close(half[key].to(value.dtype), value, rtol=1e-3, atol=1e-6)
    with safe_open(tmp_path / 'half.safetensors', framework='pt') as file:
        assert json.loads(file.metadata()['meta'])['dataset_meta'] == dict(classes=list('0123456789'))


def test_what_float16_cannot_hold_is_refused(trained, tmp_path):
    _, path = trained
    checkpoint = torch.load(path, weights_only=True)
    key = next(key for key in checkpoint['state_dict'] if key.endswith('running_var'))
    checkpoint['state_dict'][key][0] = 1e6
    torch.save(checkpoint, tmp_path / 'large.pth')
    with pytest.raises(ValueError, match=rf'{key} has values that float16 cannot hold.*--half'):
        publish_model(str(SMALL_CONFIG), str(tmp_path / 'large.pth'), str(tmp_path / 'out.safetensors'), half=True)
    assert not (tmp_path / 'out.safetensors').exists()


def test_digits_are_recognized_by_the_weights_of_the_demo(tmp_path):
    """As accurate as the table of configs says, by the same tool."""
    config = f'configs/strip_mlp/{DIGITS}.py'
    run_here('test.py', ROOT / config, WEIGHTS, '--work-dir', tmp_path)
    (found,) = tmp_path.glob('2*/2*.json')
    accuracy = json.loads(found.read_text())['accuracy/top1']
    assert accuracy == pytest.approx(float(LISTED[config]['our top-1']), abs=0.3) and accuracy > 98
    assert os.path.getsize(WEIGHTS) < 3e6
    with safe_open(WEIGHTS, framework='pt') as file:
        meta = json.loads(file.metadata()['meta'])
        kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118, it is no dict
    assert meta == dict(config=DIGITS, dataset_meta=dict(classes=list('0123456789')))
    assert kinds == {torch.float16, torch.int64}


def test_the_toolbox_predicts_with_the_weights_of_the_demo():
    from mmpretrain import ImageClassificationInferencer

    from mmstrip.datasets.digit_split import split_digits
    from mmstrip.utils.checkpoints import load_plain_weights_only

    load_plain_weights_only()
    inferencer = ImageClassificationInferencer(str(ROOT / f'configs/strip_mlp/{DIGITS}.py'), str(WEIGHTS), device='cpu')
    images, labels, _ = split_digits()['test']
    found = inferencer([np.repeat(image[..., None], 3, axis=2) for image in images[:40]], batch_size=40)
    right = sum(result['pred_class'] == str(label) for result, label in zip(found, labels))
    assert right >= 39
