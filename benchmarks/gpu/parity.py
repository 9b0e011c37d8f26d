"""The authors' outputs, stored as JSON, of parameters that follow a rule (see tests/data/parity/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmstrip.converters.official import convert_official_checkpoint
from mmstrip.models import StripMLP

DENSE_SHAPES = 'dense_tiny-light_320x448.json'
TOLERANCE = 1e-3  # of values of order 1 to 10


def load_reference(file: Path) -> dict:
    """A file of ``tests/data/parity``; the dense ones share one state dict, which stands in one of them."""
    reference = json.loads(file.read_text())
    if 'state_dict' not in reference:
        reference['state_dict'] = json.loads((file.parent / DENSE_SHAPES).read_text())['state_dict']
    return reference


def official_weights(shapes: dict) -> dict[str, torch.Tensor]:
    """Weights of each name and shape."""
    return {key: _fill(key, shape) for key, shape in shapes.items()}


def reference_images(reference: dict) -> torch.Tensor:
    """The images, (N, 3, H, W), that the outputs of a file are of."""
    images = np.random.RandomState(reference['input_seed']).standard_normal(reference['input_shape'])
    return torch.from_numpy(images.astype(np.float32))


def _fill(key: str, shape: list) -> torch.Tensor:
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    word = key.rpartition('.')[2]
    if word == 'num_batches_tracked':
        return torch.tensor(0)
    if word == 'running_var':
        value = 1 + 0.5 * np.abs(z)
    elif word in ('running_mean', 'bias', 'beta'):
        value = 0.1 * z
    elif word == 'gamma':
        value = 0.5 * z
    elif word == 'embeddings_table':
        value = 0.2 * z
    elif len(shape) == 1:
        value = 1 + 0.1 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


class ParityError(ValueError):
    """Outputs that are not the authors'."""


def stage_outputs(backbone: StripMLP, images: Tensor) -> dict[str, Tensor]:
    """Maps after each stage, before and after the final norm, by their names in the files."""
    before_norm = []
    handle = backbone.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        maps = backbone(images)
    handle.remove()
    outputs = {f'stage{i + 1}': feature for i, feature in enumerate(maps[:3])}
    return outputs | dict(stage4=before_norm[0], stage4_normed=maps[3])


def compare_outputs(outputs: dict[str, Tensor], reference: dict) -> dict[str, float]:
    """Largest difference of each output that a file has values of.

    Raises:
        ParityError: One has another shape, or differs by :data:`TOLERANCE` or more in its values, mean or deviation.
    """
    differences = {}
    for name in [name for name in outputs if name in reference]:
        expected, got = reference[name], outputs[name].cpu()
        if list(got.shape) != expected['shape']:
            raise ParityError(f'{name} must have shape {expected["shape"]}, but has {list(got.shape)}')
        values = (got.flatten()[expected['index']] - torch.tensor(expected['value'])).abs().max().item()
        found = [values, abs(got.mean().item() - expected['mean']), abs(got.std().item() - expected['std'])]
        differences[name] = max(found)
        if not all(difference < TOLERANCE for difference in found):
            raise ParityError(f"{name} differs by {max(found):.1e} from the authors', where {TOLERANCE:.0e} is allowed")
    return differences


def official_backbone(reference: dict, folder: Path) -> nn.Module:
    """Our backbone with the weights of a file, through the converter; ``folder`` takes the checkpoints."""
    torch.save({'model': official_weights(reference['state_dict'])}, folder / 'official.pth')
    converted = convert_official_checkpoint(folder / 'official.pth', folder / 'ours.pth')
    backbone = StripMLP(out_indices=(0, 1, 2, 3), **converted.backbone)
    weights = torch.load(folder / 'ours.pth', weights_only=True)['state_dict']
    own = {key.removeprefix('backbone.'): value for key, value in weights.items() if key.startswith('backbone.')}
    backbone.load_state_dict(own)
    return backbone.eval()
