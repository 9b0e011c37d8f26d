"""Authors' checkpoints: what is recognised, what is refused, what is written."""

import os

import pytest
import torch
from helpers.official import PARITY_FILES, load_reference, official_weights
from helpers.runs import run_here
from safetensors.torch import load_file, save_file

from mmstrip.converters.official import convert_official_checkpoint, convert_official_state_dict
from mmstrip.models import StripMLP

CLASSIFICATION = next(file for file in PARITY_FILES if 'tiny-light_224' in file.stem)
DENSE = next(file for file in PARITY_FILES if '320x448' in file.stem)

TOOL = 'model_converters/official_to_mmstrip.py'
STRIP = 'blocks1.0.token_mixing.smlp_block.proj_w.weight'


@pytest.fixture(scope='module')
def official():
    return official_weights(load_reference(CLASSIFICATION)['state_dict'])


def test_detector_checkpoints_give_their_backbone():
    weights = official_weights(load_reference(DENSE)['state_dict'])
    detector = {f'backbone.0.{key}': value for key, value in weights.items()}
    detector['transformer.level_embed'] = torch.zeros(4, 256)
    result = convert_official_state_dict({'model': detector})
    assert (result.kind, result.arch, result.skipped) == ('MLP-DINO', 'tiny-light', 1)
    assert all(key.startswith('backbone.') for key in result.state_dict)
    backbone = StripMLP(**result.backbone)
    backbone.load_state_dict({key[len('backbone.') :]: value for key, value in result.state_dict.items()})


def test_patches_are_read_from_the_weights():
    """MLP-DINO has two channels a patch in every arch, other than the classification code."""
    with torch.device('meta'):
        ours = StripMLP('small', num_patches=[24, 48, 96, 192])
    classification = load_reference(next(file for file in PARITY_FILES if 'small' in file.stem))['state_dict']
    weights = {}
    for key, shape in classification.items():
        if '.proj_' in key:
            shape = [2 * shape[0], *shape[1:]]
            key = key.replace('proj_w', 'proh_w')
        if not key.startswith('head.'):
            weights[key] = torch.zeros(shape)
    result = convert_official_state_dict(weights)
    assert result.arch == 'small' and result.backbone['num_patches'] == [24, 48, 96, 192]
    for key, value in ours.state_dict().items():
        assert result.state_dict[f'backbone.{key}'].shape == value.shape


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda w: w.pop('merging2.weight'), r'1 missing keys \(backbone.merging.1.weight\)'),
        (lambda w: [w.pop(k) for k in list(w) if 'fc_w' in k], 'missing keys .*lsmm.tall.weight, .*, ...'),
        (
            lambda w: w.update({'blocks1.0.extra.weight': torch.zeros(1)}),
            r'1 unexpected keys \(blocks1.0.extra.weight\)',
        ),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith('blocks3.5.')], r'80 .* and depths \(2, 2, 5, 2\)'),
        (lambda w: w.update({'merging1.weight': torch.zeros(3, 3)}), r'merging1.weight has shape \(3, 3\)'),
        (lambda w: w.update({STRIP: torch.zeros(1120, 55, 1, 3)}), r'proj_w.weight has shape \(1120, 55, 1, 3\)'),
        (lambda w: w.pop('patch_embed.weight'), r'no 4-D patch_embed.weight'),
    ],
)
def test_incomplete_or_foreign_files_write_nothing(change, words, official, tmp_path):
    weights = dict(official)
    change(weights)
    torch.save({'model': weights}, tmp_path / 'src.pth')
    with pytest.raises(ValueError, match=f'src.pth: .*{words}'):
        convert_official_checkpoint(tmp_path / 'src.pth', tmp_path / 'dst.pth')
    assert os.listdir(tmp_path) == ['src.pth']


def test_other_networks_are_refused(tmp_path):
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / 'resnet.pth')
    with pytest.raises(ValueError, match='not a Strip-MLP checkpoint .* its first keys are conv1.weight'):
        convert_official_checkpoint(tmp_path / 'resnet.pth', tmp_path / 'dst.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='not a checkpoint of the authors'):
        convert_official_checkpoint(tmp_path / 'list.pth', tmp_path / 'dst.pth')


def test_command_line(official, tmp_path, capsys):
    torch.save({'model': official, 'epoch': 299}, tmp_path / 'src.pth')
    run_here(TOOL, tmp_path / 'src.pth', tmp_path / 'dst.pth')
    assert f'Strip-MLP tiny-light from classification, {len(official)} tensors' in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / 'dst.pth', weights_only=True)
    assert checkpoint['meta']['arch'] == 'tiny-light' and 'head.fc.weight' in checkpoint['state_dict']
    for src, dst, words in (
        ('src.pth', '.', f'Error: cannot write {tmp_path}: it is a folder, not a file'),
        ('none.pth', 'dst2.pth', f'Error: no checkpoint at {tmp_path / "none.pth"}'),
    ):
        with pytest.raises(SystemExit) as error:
            run_here(TOOL, tmp_path / src, tmp_path / dst)
        assert str(error.value) == words


def test_safetensors_in_and_out(official, tmp_path):
    save_file({key: value.contiguous() for key, value in official.items()}, tmp_path / 'theirs.safetensors')
    run_here(TOOL, tmp_path / 'theirs.safetensors', tmp_path / 'ours.safetensors')
    expected = convert_official_state_dict(official).state_dict
    written = load_file(tmp_path / 'ours.safetensors')
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())
