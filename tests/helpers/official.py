"""Outputs of the authors' networks (see tests/data/parity)."""

from benchmarks.gpu.parity import DENSE_SHAPES as DENSE_NAME
from benchmarks.gpu.parity import load_reference, official_weights, reference_images

from . import DATA

__all__ = ['DENSE_SHAPES', 'PARITY_FILES', 'load_reference', 'official_weights', 'reference_images']

PARITY_FILES = sorted((DATA / 'parity').glob('*.json'))
assert len(PARITY_FILES) == 4, f'reference outputs are missing from {DATA / "parity"}'
DENSE_SHAPES = DATA / 'parity' / DENSE_NAME
