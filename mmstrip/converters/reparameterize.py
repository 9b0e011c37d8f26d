"""Conversion of a trained model to its deploy form."""

import torch

from ..utils.checkpoints import load_full_checkpoint, write_checkpoint
from ..utils.config import build_model, load_model_config

TOLERANCE = 1e-4


def convert_to_deploy(config: str, src: str, dst: str, trusted: bool = False) -> float:
    """Write the deploy form of a trained model, after comparing both forms on random images.

    Args:
        config: Config file of a toolbox's model, whose backbone has ``switch_to_deploy()``.
        src: Checkpoint with all weights of the model.
        dst: File to write: a state dict for the same config with ``model.backbone.deploy=True``, with the class names
            of ``src`` if it has any.
        trusted: Let ``src`` run code. Defaults to False.

    Returns:
        The largest difference between the features of both forms, relative to the largest feature.

    Raises:
        FileNotFoundError: The config or the checkpoint is missing.
        ValueError: The backbone has no deploy form or is already in it, the checkpoint does not fit the model, or the
            forms differ by more than 1e-4; then nothing is written.
    """
    settings = load_model_config(config)
    backbone = settings.model.get('backbone')
    if not backbone:
        raise ValueError(f'{config} has no model.backbone')
    if backbone.get('deploy'):
        raise ValueError(f'{config} must have model.backbone.deploy=False, the form that was trained, but it is set')
    model = build_model(settings.model).eval()
    if not hasattr(model.backbone, 'switch_to_deploy'):
        raise ValueError(f'{config}: {type(model.backbone).__name__} has no deploy form')
    checkpoint = load_full_checkpoint(model, config, src, trusted)
    images = torch.rand(2, model.backbone.in_channels, *(side + 32 for side in model.backbone.img_size))
    with torch.no_grad():
        expected = model.backbone(images)
        model.backbone.switch_to_deploy()
        features = model.backbone(images)
    error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, features))
    if not error < TOLERANCE:
        raise ValueError(f'{src}: the deploy form differs by {error:.1e}, more than {TOLERANCE:g}; nothing was written')
    meta = {key: value for key, value in checkpoint['meta'].items() if key == 'dataset_meta'}
    write_checkpoint(dict(state_dict=model.state_dict(), meta=dict(meta, deploy=True)), dst)
    return error
