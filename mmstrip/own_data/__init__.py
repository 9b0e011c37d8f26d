"""Configs for your own images: read and check a folder, and write a short config for it."""

from .classification import write_classification
from .detection import write_detection
from .segmentation import write_segmentation

__all__ = ['write_classification', 'write_detection', 'write_segmentation']
