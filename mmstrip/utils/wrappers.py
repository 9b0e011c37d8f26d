"""Models inside wrappers."""

from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP, test-time augmentation or both."""
    while hasattr(model, 'module'):
        model = model.module
    return model
