"""Outputs of the authors' networks, stored as JSON, of parameters that follow a rule (see tests/data/parity)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from . import DATA

PARITY_FILES = sorted((DATA / 'parity').glob('*.json'))
assert len(PARITY_FILES) == 4, f'reference outputs are missing from {DATA / "parity"}'
DENSE_SHAPES = DATA / 'parity' / 'dense_tiny-light_320x448.json'


def load_reference(file: Path) -> dict:
    """A file of ``tests/data/parity``; the dense ones share one state dict, which stands in one of them."""
    reference = json.loads(file.read_text())
    if 'state_dict' not in reference:
        reference['state_dict'] = json.loads(DENSE_SHAPES.read_text())['state_dict']
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
