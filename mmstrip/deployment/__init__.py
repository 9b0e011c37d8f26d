"""Exported models: write them, describe them, and predict with them."""

from .export import Export, export_model
from .predictor import Predictor, load

__all__ = ['Export', 'Predictor', 'export_model', 'load']
