"""The same numbers as the authors' code, through the converter and a strict load."""

import pytest
import torch
from helpers.official import PARITY_FILES, load_reference, official_weights, reference_images
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from mmstrip.converters.official import convert_official_checkpoint
from mmstrip.models import StripMLP

TOLERANCE = 1e-4  # of values of order 1 to 10


@pytest.mark.parametrize('file', PARITY_FILES, ids=lambda file: file.stem)
def test_outputs_equal_the_authors(file, tmp_path):
    reference = load_reference(file)
    torch.save({'model': official_weights(reference['state_dict'])}, tmp_path / 'official.pth')
    result = convert_official_checkpoint(tmp_path / 'official.pth', tmp_path / 'ours.pth')
    assert result.arch == reference['arch']
    assert result.kind == ('MLP-DINO' if file.stem.startswith('dense') else 'classification')

    outputs = _outputs(result, tmp_path / 'ours.pth', reference)
    compared = [name for name in outputs if name in reference]
    assert len(compared) == (5 if result.kind == 'classification' else 3)
    for name in compared:
        expected, got = reference[name], outputs[name]
        assert list(got.shape) == expected['shape']
        values = (got.flatten()[expected['index']] - torch.tensor(expected['value'])).abs().max().item()
        assert values < TOLERANCE, name
        assert (
            abs(got.mean().item() - expected['mean']) < TOLERANCE
            and abs(got.std().item() - expected['std']) < TOLERANCE
        )


def _outputs(result, checkpoint, reference) -> dict:
    """Maps after each stage, before and after the final norm, and logits where there is a head."""
    init_default_scope('mmpretrain')
    if result.kind == 'classification':
        head = dict(
            type='LinearClsHead', num_classes=reference['num_classes'], in_channels=reference['stage4']['shape'][1]
        )
        model = MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(type='mmstrip.StripMLP', out_indices=(0, 1, 2, 3), **result.backbone),
                neck=dict(type='GlobalAveragePooling'),
                head=head,
            )
        )
        backbone = model.backbone
        # The published count is of the network as built, 1000 (or 100) classes included.
        assert sum(p.numel() for p in model.parameters()) == reference['params']
    else:
        model = torch.nn.Module()
        model.backbone = backbone = StripMLP(out_indices=(0, 1, 2, 3), **result.backbone)
    load_checkpoint(model, str(checkpoint), strict=True)
    model.eval()
    images = reference_images(reference)
    before_norm = []
    backbone.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        maps = backbone(images)
        outputs = {f'stage{i + 1}': feature for i, feature in enumerate(maps[:3])}
        outputs |= dict(stage4=before_norm[0], stage4_normed=maps[3])
        if result.kind == 'classification':
            outputs['logits'] = model.head(model.neck(backbone(images)))
    return outputs
