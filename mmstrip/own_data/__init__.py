"""Configs for one's own images: a folder is read, checked and described, and a short config is written for it."""

from .classification import write_classification
from .detection import write_detection
from .segmentation import write_segmentation

__all__ = ['write_classification', 'write_detection', 'write_segmentation']
